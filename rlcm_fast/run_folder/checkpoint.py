"""Checkpoints: each one is complete or absent, and the last K are kept.

    run_dir/checkpoints/iteration_000050/     after 50 iterations
        deepspeed/       trained weights and their optimizer's state as DeepSpeed writes them
        unet.safetensors the weights alone, float32, for people; adapters.safetensors if only adapters are trained
        ema.safetensors  the moving average of the trained weights, if ema.decay is not 0
        state.json       iteration, queries, prompt cursor, advantage statistics, number of processes

A checkpoint is written under a temporary name and renamed when all ranks are done. So a run that is killed at any
moment, or a full disk, leaves the earlier checkpoints intact. The next checkpoint deletes an unfinished one, if the
run that failed could not do so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.engine.base import Engine

FORMAT = 2  # of the checkpoints that this version writes; 1, without a number in state.json, was DeepSpeed's pickles

_PREFIX = "iteration_"
_NAME = re.compile(_PREFIX + r"\d{6,}")


def save_checkpoint(run_dir: Path, iteration: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `iteration` iterations and deletes all but the last `keep`; every rank must call.

    Raises:
        OSError: the disk is full or not writable; torch and safetensors raise errors of other types, see
            `is_full_disk`. Earlier checkpoints are untouched, and nothing is left of this one.
    """
    # Write everything under a temporary name, on all ranks.
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

    # Give it its final name. Then delete the oldest, and those that a resumed run left behind by starting before them.
    if parallel.is_main():
        if folder.exists():
            _set_aside(folder)
        os.replace(partial, folder)
        earlier = [other for other in complete(run_dir) if _iteration(other) <= iteration]
        abandoned = [other for other in complete(run_dir) if _iteration(other) > iteration]
        for old in [*earlier[:-keep], *abandoned]:
            _set_aside(old)
        for trash in folder.parent.glob(".trash_*"):
            shutil.rmtree(trash)
    parallel.barrier()
    return folder


def is_full_disk(error: BaseException) -> bool:
    """Whether an OSError, or an error of safetensors or torch (which drops the reason), means a full disk."""
    texts = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "unexpected pos ")
    return any(text in str(error) for text in texts)


def load_checkpoint(folder: Path, engine: Engine) -> dict[str, Any]:
    """Restores the engine, on any number of processes, and returns the state that was saved with it."""
    engine.load(folder)
    return read_state(folder)


def read_state(folder: Path) -> dict[str, Any]:
    """Returns what `save_checkpoint` was given as `state`, and the checkpoint's format and number of processes."""
    return json.loads((folder / "state.json").read_text())


def complete(run_dir: Path) -> list[Path]:
    """Lists the checkpoints, oldest first; unfinished ones and folders that a user put there have other names."""
    folders = (run_dir / "checkpoints").glob(f"{_PREFIX}*")
    return sorted((folder for folder in folders if _NAME.fullmatch(folder.name)), key=_iteration)


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, as "state.json is empty"; None if it is whole."""
    state = folder / "state.json"
    if not state.is_file():
        return "state.json is missing"
    try:
        json.loads(state.read_text())
    except ValueError:
        return "state.json is no JSON" if state.stat().st_size else "state.json is empty"
    return None


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint that is whole, and says in one line each which newer ones are damaged."""
    for folder in reversed(complete(run_dir)):
        fault = damage(folder)
        if fault is None:
            return folder
        say(f"checkpoint {folder} is damaged ({fault}): the one before is taken")
    return None


def weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's weights alone, float32 on the CPU, by name; those of its adapters if it trained those."""
    adapters = folder / "adapters.safetensors"
    return load_file(adapters if adapters.is_file() else folder / "unet.safetensors")


def has_average(folder: Path) -> bool:
    """Tells whether the checkpoint also holds a moving average of its weights."""
    return (folder / "ema.safetensors").is_file()


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """Finds the folder that `resume` names; None if it is "latest" and the run stopped before its first checkpoint."""
    if resume != "latest":
        if not (Path(resume) / "state.json").is_file():
            raise ValueError(
                f"resume={resume} is no checkpoint: it has no state.json; give latest or a folder in "
                f"{run_dir}/checkpoints"
            )
        return Path(resume)
    if not run_dir.is_dir():
        raise ValueError(f"resume=latest finds no run in run_dir={run_dir}; check run_dir, or leave resume out")
    return (complete(run_dir) or [None])[-1]


def starting_point(resume: str | None, run_dir: Path) -> Path | None:
    """Finds the checkpoint that all processes start from; None if the run is new or has no checkpoint yet.

    Raises:
        ValueError: processes see different checkpoints, or a new run would write over another's folder.
    """
    # Refuse a new run in an old folder.
    if resume is None:
        if (run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"run_dir={run_dir} already holds a run; go on with --resume latest, or give another --run_dir"
            )
        return None

    # Compare what the processes see: a file system may show a new folder later on some machines.
    checkpoint = find_checkpoint(resume, run_dir)
    found = dict.fromkeys(parallel.all_gather_list([str(checkpoint)]))
    if len(found) > 1:
        raise ValueError(
            f"resume={resume} is another checkpoint on some processes ({', '.join(found)}): their file system is behind"
            " or run_dir is not shared; name one of them, or start again when all processes see the same"
        )
    return checkpoint


def _write(folder: Path, engine: Engine, state: dict[str, Any]) -> None:
    engine.save(folder)
    # This copies all weights to the CPU, so only one process does it; under ZeRO-3 all must help to gather them.
    weights = engine.full_weights() if parallel.is_main() or engine.zero_stage == 3 else {}
    if parallel.is_main():
        adapters = {name: weight for name, weight in weights.items() if ".lora_" in name}
        save_file(adapters or weights, folder / ("adapters.safetensors" if adapters else "unet.safetensors"))
        (folder / "state.json").write_text(json.dumps({**state, "num_processes": parallel.world_size()}))


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint before it is deleted, so that a half-deleted folder does not look like a checkpoint."""
    trash = folder.with_name(f".trash_{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))
