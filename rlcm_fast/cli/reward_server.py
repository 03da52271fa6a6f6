"""Serve a reward on another GPU or machine; training calls it as the reward `http`.

It batches the images of requests that come together, answers /health and /metrics, and ends cleanly at Ctrl-C and
SIGTERM: requests that were taken are answered first.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import whole
from rlcm_fast.cli.evaluate import reward_config
from rlcm_fast.cli.output import check_device
from rlcm_fast.config import bounds

if TYPE_CHECKING:
    import socket

    import torch

    from rlcm_fast.config import RewardConfig
    from rlcm_fast.rewards import Reward

ENDS_WITHIN_S = 60
MOST_WAITING = 512  # images; of 1024 x 1024 pixels they are 1.6 GB


def add_arguments(parser: argparse.ArgumentParser) -> None:
    reward = "a built-in name (a wrong one lists all), package.module:Class, or a mapping as in a config"
    parser.add_argument("--reward", required=True, metavar="NAME", help=reward)
    arguments = "keyword arguments of the reward, as in a config: '{model: folder/of/clip, dtype: bf16}'"
    parser.add_argument("--arguments", metavar="MAPPING", help=arguments)
    host = "address to listen at; 0.0.0.0 is open to the network: use it behind a firewall, or with a key"
    parser.add_argument("--host", default="127.0.0.1", help=host)
    parser.add_argument("--port", type=whole(0, bounds.PORT), default=8200, help="0 takes any free port")
    parser.add_argument("--device", help="where the reward runs, as cpu or cuda:1; default: cuda if there is one")
    parser.add_argument("--batch-size", type=whole(1, bounds.BATCH), default=16, help="images scored at once")
    parser.add_argument("--most-mib", type=whole(1, bounds.MIB), default=64, help="largest body of a request, in MiB")
    key = "environment variable with a key that requests must bear"
    parser.add_argument("--api-key-variable", metavar="NAME", help=key)


def run(arguments: argparse.Namespace) -> None:
    # Check what can be wrong before the reward loads.
    key = _key(arguments.api_key_variable)
    config = reward_config(arguments.reward, arguments.arguments)
    _check_files(config)
    from rlcm_fast.rewards.extras import require

    for package in ("uvicorn", "starlette"):
        require(package, "server")
    listener = _listen(arguments.host, arguments.port)

    # Build the reward.
    from rlcm_fast.rewards.batcher import Batcher
    from rlcm_fast.rewards.serving import Service, application

    device = _find_device(arguments.device)
    reward = _build(config, device)
    about = {"device": str(device), "batch_size": arguments.batch_size, "used": _used(config.name, reward)}
    batcher = Batcher(reward, device, arguments.batch_size, MOST_WAITING)
    app = application(Service(config.name, batcher, about, arguments.most_mib * 2**20, key))

    # Serve it until a signal comes.
    host, port = listener.getsockname()[:2]
    print(f"serving {config.name} on http://{host}:{port} ({device}); Ctrl-C ends it", flush=True)
    serve(app, listener)
    print(f"stopped after {batcher.counts.images} images in {batcher.counts.batches} batches", flush=True)


def serve(app: Any, listener: socket.socket) -> None:
    """Runs the application on a socket until SIGINT or SIGTERM comes; requests in progress are answered first."""
    import signal

    import uvicorn

    # After it has ended, uvicorn raises the signal that ended it once more, for whoever handled signals before it. For
    # a server that is the wanted end, and no error.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=ENDS_WITHIN_S
        )
        uvicorn.Server(settings).run(sockets=[listener])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _key(variable: str | None) -> str:
    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ValueError(f"api-key-variable={variable} is not set in the environment; export it, or leave it out")
    return key


def _check_files(config: RewardConfig) -> None:
    """Looks for the reward's files and says what is downloaded; raises ValueError for what is missing."""
    from rlcm_fast.rewards import check_reward

    for download in check_reward(config, "reward", must_run=True):
        print(f"downloading {download}", flush=True)


def _listen(host: str, port: int) -> socket.socket:
    import socket

    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=256)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python repeats the address in brackets
        raise ValueError(f"host={host} port={port} cannot be listened at: {reason}; give another") from error


def _find_device(name: str | None) -> torch.device:
    """Returns the device, which rewards take for "same" from here on."""
    import torch

    from rlcm_fast.cli.scoring import device_of

    check_device(name)
    device = device_of(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _build(config: RewardConfig, device: torch.device) -> Reward:
    """Makes the reward on `device`, unless its arguments name another; raises ValueError for one that scores groups."""
    import inspect
    from dataclasses import replace

    from rlcm_fast.plugins import load_class
    from rlcm_fast.rewards import BUILT_IN, Reward, make_placed, place

    there = place(config, "reward")
    arguments = dict(there.arguments)
    if "device" in inspect.signature(load_class(there.name, BUILT_IN, "reward")).parameters:
        arguments.setdefault("device", "cpu" if device.type == "cpu" else "same")
    reward = make_placed(replace(there, arguments=arguments), "reward")
    if reward.scope != "image" or not isinstance(reward, Reward):
        raise ValueError(
            f"reward={config.name} scores groups of images, which a server does not see; name it in the config of the "
            "training, and serve rewards of single images"
        )
    return reward


def _used(name: str, reward: Reward) -> dict[str, Any]:
    from rlcm_fast.rewards import used

    return used({name: (reward, 1.0)}).get(name, {})
