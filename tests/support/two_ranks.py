"""What each of several processes runs in tests/test_processes.py: a few whole runs, watched from inside."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny_runs
import torch

from rlcm_fast import parallel
from rlcm_fast.config import parse_config
from rlcm_fast.trainer import Trainer


def run_watched(model: str, folder: Path, runs: Mapping[str, Mapping[str, object]]) -> int:
    """Runs each into folder/<name>, and leaves what this rank saw in folder/<name>_<rank>.pt."""
    for name, settings in runs.items():
        trainer = Trainer(parse_config(tiny_runs.arguments(model, folder / name, settings)))
        seen = _watch(trainer) | {"start": trainer.engine.full_weights()}
        trainer.run()
        seen |= {"weights": trainer.engine.full_weights(), "final_weights": trainer.engine.final_weights()}
        torch.save(seen, folder / f"{name}_{parallel.rank()}.pt")
    return 0


def _watch(trainer: Trainer) -> dict[str, Any]:
    seen: dict[str, Any] = {"prompts": [], "noise": [], "rewards": [], "advantages": []}
    rollout, shared_advantages = trainer.rollout, trainer.shared_advantages

    def watched_rollout(prompts: Any, iteration: int) -> Any:
        batch = rollout(prompts, iteration)
        seen["prompts"].append([prompt.text for prompt in prompts])
        seen["noise"].append(batch.trajectory.latents[:, 0].clone())
        seen["rewards"].append(batch.rewards.total)
        return batch

    def watched_advantages(batch: Any, prompts: Any) -> Any:
        seen["advantages"].append(shared_advantages(batch, prompts))
        return seen["advantages"][-1]

    trainer.rollout, trainer.shared_advantages = watched_rollout, watched_advantages  # type: ignore[method-assign]
    return seen
