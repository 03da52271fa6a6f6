"""Training runs that take seconds, and processes for them that find everything imported when they start."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

PROMPTS = ("a red circle", "a blue square", "a star", "a green triangle", "two cats")
REWARD = "plugin_rewards:Brightness"

# 4 samples of 2 actions make 8 transitions: 2 updates of 2 micro-batches of 2.
_SETTINGS: dict[str, object] = {
    "policy.num_steps": 3,
    "prompts.num_prompts": 2,
    "prompts.images_per_prompt": 2,
    "rewards": [{"name": REWARD}],
    "rollout.micro_batch_size": 2,
    "advantages.buffer_size": 6,
    "advantages.min_count": 3,
    "update.num_updates": 2,
    "update.micro_batch_size": 2,
    "update.clip_range": 1e-2,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_updates": 2,
    "optimizer.final_lr_fraction": 0.1,
    "evaluation.every": 0,
    "evaluation.num_images": 3,
    "evaluation.micro_batch_size": 2,
    "checkpoint.every": 0,
    "tracking.tensorboard": False,
    "tracking.grid_every": 0,
    "tracking.grid_images": 2,
    "num_iterations": 3,
}
_OF_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def arguments(model: str, run_dir: Path, settings: Mapping[str, object] | None = None) -> list[str]:
    """The command line of a tiny run; `settings` by dotted name."""
    prompts = Path(model) / "prompts.txt"
    unfinished = prompts.with_suffix(f".{os.getpid()}")
    unfinished.write_text("\n".join(PROMPTS))
    unfinished.replace(prompts)  # at once: the other rank may be reading it
    paths = {"model.path": model, "run_dir": run_dir, "prompts.source": prompts, "evaluation.prompts": prompts}
    values = {**paths, **_SETTINGS, **(settings or {})}
    return [f"--{name}={json.dumps(v) if isinstance(v, list | bool) else v}" for name, v in values.items()]


def metrics(run_dir: Path, with_times: bool = False) -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl, without what a clock tells."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return lines if with_times else [{k: v for k, v in line.items() if not _is_time(k)} for line in lines]


def _is_time(key: str) -> bool:
    return key.startswith("seconds/") or key == "images_per_second"


def clean_environment(**more: str) -> dict[str, str]:
    """Ours without a launcher's variables, and with the plug-ins on the path."""
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    kept = {name: value for name, value in os.environ.items() if name not in _OF_A_LAUNCHER}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}


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
    for name in _OF_A_LAUNCHER:
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
