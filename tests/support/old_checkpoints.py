"""Writes an engine's checkpoint as format 1 did: DeepSpeed's pickles, or one of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.engine.zero import ZeroEngine


def save_old(engine: Any, folder: Path) -> None:
    """What `engine.save` was; every rank must call."""
    if isinstance(engine, ZeroEngine):
        engine._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False, exclude_frozen_parameters=True)
        return
    frozen = {name for name, weight in engine._network.named_parameters() if not weight.requires_grad}
    weights = {name: weight for name, weight in engine._network.state_dict().items() if name not in frozen}
    state = {"network": weights, "optimizer": engine._optimizer.state_dict(), "num_updates": engine._num_updates}
    if parallel.is_main():
        torch.save(state, folder / "engine.pt")


def write_old_state(folder: Path, state: dict[str, Any]) -> None:
    """The state.json of format 1, which names no format."""
    (folder / "state.json").write_text(json.dumps({**state, "num_processes": parallel.world_size()}))
