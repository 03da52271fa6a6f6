"""A reward server in a thread of the test, and rewards that it serves."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from rlcm_fast.rewards import Reward
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.batcher import Batcher
from rlcm_fast.trajectory import Prompt


class Mean:
    """The mean of the pixels; notes the sizes of its batches, and may take its time."""

    scope = "image"

    def __init__(self, seconds: float = 0.0) -> None:
        self.batches: list[int] = []
        self.tasks: list[str] = []
        self._seconds = seconds

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.batches.append(len(images))
        self.tasks += [prompt.task for prompt in prompts]
        time.sleep(self._seconds)
        return torch.stack([image.double().mean().float() for image in images])  # alike in every batch


class Picky(Mean):
    """Raises for the prompts "raise" and "name", the second with the others' scores; "nan" is not a number."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        scores = super().__call__(images, prompts)
        if "raise" in texts:
            raise RuntimeError("this picture\nkills me")
        scores[[text == "nan" for text in texts]] = torch.nan
        if "name" in texts:
            raise ImagesFailed(scores, {texts.index("name"): "I cannot name it"})
        return scores


@dataclass(frozen=True)
class Served:
    """A server that runs."""

    url: str
    batcher: Batcher
    server: object


@contextlib.contextmanager
def served(
    reward: Reward, name: str = "mean", most_waiting: int = 64, most_bytes: int = 2**20, key: str = ""
) -> Iterator[Served]:
    """Serves a reward on a free port of the loopback, and shuts the server down as a signal does."""
    uvicorn = pytest.importorskip("uvicorn")
    pytest.importorskip("starlette")
    from rlcm_fast.rewards.serving import Service, application

    batcher = Batcher(reward, torch.device("cpu"), 4, most_waiting)
    app = application(Service(name, batcher, {"device": "cpu"}, most_bytes, key))
    listener = socket.create_server(("127.0.0.1", 0))
    settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on", timeout_graceful_shutdown=10)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.005)
    try:
        yield Served(f"http://127.0.0.1:{listener.getsockname()[1]}", batcher, server)
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()
