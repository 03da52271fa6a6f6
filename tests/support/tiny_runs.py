"""Training runs that take seconds; benchmarks/shared/run_processes.py starts those that are processes of their own."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.shared.run_processes import OF_A_LAUNCHER

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
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    return {**kept, "PYTHONPATH": os.pathsep.join(filter(None, paths)), **more}
