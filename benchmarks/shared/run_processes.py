"""Processes of a run that find everything imported: forked from a server that has imported the trainer."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start(target: Callable[..., int], *values: Any, log: Path, rank: int = 0, group: tuple[int, int] | None = None):
    """A process that runs `target(*values)` and exits with what it returns; group: (world size, port)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rlcm_fast.trainer"])
    process: BaseProcess = context.Process(target=_run, args=(target, values, str(log), rank, group), daemon=True)
    process.start()
    return process


def train(argv: list[str]) -> int:
    """What `python rlcm_fast/train.py` does."""
    from rlcm_fast.train import main

    return main(argv)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(
    target: Callable[..., int], values: tuple[Any, ...], log: str, rank: int, group: tuple[int, int] | None
) -> None:
    for name in OF_A_LAUNCHER:
        os.environ.pop(name, None)
    if group:
        size, port = group
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    sys.exit(target(*values))
