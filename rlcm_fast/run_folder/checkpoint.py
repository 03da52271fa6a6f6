"""Checkpoints: complete or absent, the last K kept.

    run_dir/checkpoints/iteration_000050/     after 50 iterations
        deepspeed/       trained weights and their optimizer state as DeepSpeed writes them
        unet.safetensors the weights alone, float32, for people; adapters.safetensors where only those are trained
        ema.safetensors  their moving average, where ema.decay is not 0
        state.json       iteration, queries, prompt cursor, advantage statistics, number of processes

A checkpoint is written under a temporary name and renamed when all ranks are done, so a run killed at any moment, or a
full disk, leaves the checkpoints before it intact; what was written of it is deleted, at the latest by the next one.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from rlcm_fast import parallel
from rlcm_fast.engine.base import Engine

_PREFIX = "iteration_"


def save_checkpoint(run_dir: Path, iteration: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `iteration` iterations and deletes all but the last `keep`; every rank must call.

    Raises:
        OSError: the disk is full or not writable (where torch or safetensors was writing, an error of theirs: see
            `is_full_disk`). Earlier checkpoints are untouched, and nothing is left of this one.
    """
    folder = run_dir / "checkpoints" / f"{_PREFIX}{iteration:06d}"
    partial = folder.with_name(f".partial_{folder.name}")
    if parallel.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.barrier()
    try:
        _write(partial, engine, state)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    parallel.barrier()
    if parallel.is_main():
        if folder.exists():
            _set_aside(folder)
        os.replace(partial, folder)
        earlier = [other for other in _complete(run_dir) if other <= folder]
        abandoned = [other for other in _complete(run_dir) if other > folder]  # by resuming from before them
        for old in [*earlier[:-keep], *abandoned]:
            _set_aside(old)
        for trash in folder.parent.glob(".trash_*"):
            shutil.rmtree(trash)
    parallel.barrier()
    return folder


def is_full_disk(error: BaseException) -> bool:
    """Whether that is what OSError, safetensors or torch (which forgets the reason) mean."""
    texts = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos ")
    return any(text in str(error) for text in texts)


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Restores the engine and returns the state that was saved with it, on whatever number of processes."""
    engine.load(folder)
    return json.loads((folder / "state.json").read_text())


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The folder that `resume` names; None where it is "latest" and the run was stopped before its first checkpoint."""
    if resume != "latest":
        if not (Path(resume) / "state.json").is_file():
            raise ValueError(
                f"resume={resume} is no checkpoint: it has no state.json; give latest or a folder in "
                f"{run_dir}/checkpoints"
            )
        return Path(resume)
    if not run_dir.is_dir():
        raise ValueError(f"resume=latest finds no run in run_dir={run_dir}; check run_dir, or leave resume out")
    return (_complete(run_dir) or [None])[-1]


def starting_point(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint that all processes begin with; None where the run is new, or had none yet.

    Raises:
        ValueError: processes see different checkpoints, or a new run would write over another's folder.
    """
    if resume is None:
        if (run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"run_dir={run_dir} already holds a run; go on with --resume latest, or give another --run_dir"
            )
        return None
    own = find_checkpoint(resume, run_dir)
    found = dict.fromkeys(parallel.all_gather_list([str(own)]))
    if len(found) > 1:
        raise ValueError(
            f"resume={resume} is another checkpoint on some processes ({', '.join(found)}): their file system is behind"
            " or run_dir is not shared; name one of them, or start again when all see the same"
        )
    return own


def _write(folder: Path, engine: Engine, state: dict[str, Any]) -> None:
    engine.save(folder)
    # a copy of all weights in the CPU's memory, so on one process alone where the others need not help to gather it
    weights = engine.full_weights() if parallel.is_main() or engine.zero_stage == 3 else {}
    if parallel.is_main():
        adapters = {name: weight for name, weight in weights.items() if ".lora_" in name}
        save_file(adapters or weights, folder / ("adapters.safetensors" if adapters else "unet.safetensors"))
        (folder / "state.json").write_text(json.dumps({**state, "num_processes": parallel.world_size()}))


def _set_aside(folder: Path) -> None:
    """Takes its final name away: a folder that is half deleted is no checkpoint."""
    trash = folder.with_name(f".trash_{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)


def _complete(run_dir: Path) -> list[Path]:
    """Oldest first; only whole checkpoints bear the final name."""
    return sorted((run_dir / "checkpoints").glob(f"{_PREFIX}*"))
