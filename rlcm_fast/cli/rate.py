"""Rate a model's images on a local web page and train on your ratings; the config and overrides of train.py.

Ratings, images and checkpoints lie in the run's folder. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import whole
from rlcm_fast.config import bounds

if TYPE_CHECKING:
    from rlcm_fast.config import Config, RewardConfig

_DEFAULTS = Path(__file__).parent.parent / "rating" / "defaults.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rlcm-fast rate --config FILE [--port N] [--share-on-network] [--open] [--section.field VALUE ...]"
    config = "a YAML file or a name of `rlcm-fast configs`, as for train.py, whose --help lists the fields"
    parser.add_argument("--config", action="append", required=True, metavar="FILE", help=config)
    port = "port of the page, on 127.0.0.1; 0 takes any free one; default: that of the config, or 8300"
    parser.add_argument("--port", type=whole(0, bounds.PORT), metavar="N", help=port)
    share = "serve the page to other devices in your network, as to a phone; whoever has the address can rate"
    parser.add_argument("--share-on-network", action="store_true", help=share)
    parser.add_argument("--open", action="store_true", help="open the page in this machine's browser")


def run(arguments: argparse.Namespace) -> int:
    # Read the config, put the person in, and suit the rest to the person.
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate
    from rlcm_fast.rating.suited import changes, said

    files = [part for file in (_DEFAULTS, *arguments.config) for part in ("--config", str(file))]
    config = parse_config([*files, *arguments.overrides])
    wanted = {"port": arguments.port, "share_on_network": arguments.share_on_network or None}
    person, lines = _person(config, {name: value for name, value in wanted.items() if value is not None})
    changed = changes(config, replaces=bool(lines))
    options = [*files, *(change.option for change in changed), *arguments.overrides, *person]
    if config.resume is None and any(Path(config.run_dir).glob("checkpoints/*")):
        lines.append(f"goes on with the run in {config.run_dir}; give --run_dir for a new one")
        options += ["--resume", "latest"]

    # Say what is another than in the config, unless it cannot be trained at all.
    suited = parse_config(options)
    validate(suited, 1)
    for line in (*lines[:1], *said(changed, config, suited), *lines[1:]):
        print(line, file=sys.stderr, flush=True)

    # Train, which asks.
    if arguments.open:
        _open_when_there(Path(config.run_dir))
    from rlcm_fast.train import main

    return main(options)


def _person(config: Config, wanted: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Returns the options that put the reward `human` into the config, with the arguments that the command gives.

    The second list is what to say about it: nothing if the config names the person itself.

    Raises:
        ValueError: tasks have no such reward.
    """
    if config.tasks:
        if not any(reward.name == "human" for task in config.tasks for reward in task.rewards):
            raise ValueError("tasks: no task has the reward human; add {name: human} to the rewards of one")
        if wanted:
            named = " ".join(f"{name}={value}" for name, value in wanted.items())
            raise ValueError(f"tasks: give {named} in the arguments of the reward human in the config")
        return [], []
    rewards = [_with(reward, wanted) if reward.name == "human" else reward for reward in config.rewards]
    if all(reward.name != "human" for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        line = f"rewards: you rate instead of {names}; name human beside them in the config to keep both"
        return [f"--rewards={json.dumps([{'name': 'human', 'arguments': wanted}])}"], [line]
    return [f"--rewards={json.dumps([asdict(reward) for reward in rewards])}"] if wanted else [], []


def _with(reward: RewardConfig, wanted: dict[str, Any]) -> RewardConfig:
    from dataclasses import replace

    return replace(reward, arguments={**reward.arguments, **wanted})


def _open_when_there(run_dir: Path) -> None:
    """Opens the page in a browser, from a thread, once the run serves it."""
    import threading
    import webbrowser

    from rlcm_fast.rating.reward import wait_for_page

    def wait() -> None:
        url = wait_for_page(run_dir)
        if url:
            webbrowser.open(url)

    threading.Thread(target=wait, name="open_page", daemon=True).start()
