"""Room for a run: the memory that it is planned to need, and the disk for its checkpoints, export and downloads."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from huggingface_hub import constants

from rlcm_fast.cli import plan
from rlcm_fast.cli.diagnoses import GB, GIB, Diagnosis, State
from rlcm_fast.config import Config
from rlcm_fast.config.batches import is_open
from rlcm_fast.planner.gpus import find_gpu

_LARGEST = "h200"  # what the plan is asked for: bytes do not depend on the GPU, and few remedies are searched


def planned_bytes(options: Sequence[str]) -> dict[str, Any]:
    """What `rlcm-fast plan --json` says of the config and overrides `options`; raises what it raises."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    plan.add_arguments(parser)
    arguments, arguments_of_config = parser.parse_known_args([*options, "--gpu", _LARGEST, "--json"])
    arguments.overrides = arguments_of_config
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        plan.run(arguments)
    return json.loads(printed.getvalue())


def options_for_auto(config: Config, gpu: str | None) -> list[str]:
    """Returns what makes the plan choose what is `auto` for the GPU of that name, or of this machine."""
    if not is_open(config) or config.engine.memory_gib > 0 or (gpu is None and not torch.cuda.is_available()):
        return []
    gib = find_gpu(gpu).memory_gib if gpu else torch.cuda.get_device_properties(0).total_memory / GIB
    return ["--engine.memory_gib", str(gib)]


def memory_room(planned: dict[str, Any], gpu: str | None) -> Diagnosis:
    """Compares the planned peak with the memory of the GPU, of `gpu` if it is named, or of this machine."""
    # Find out what there is.
    stages = planned["peak_bytes"]
    stage = max(stages, key=lambda name: stages[name])
    needed = stages[stage] / GIB
    if gpu is not None:
        there, where = find_gpu(gpu).memory_gib, f"of a {gpu}"
    elif torch.cuda.is_available():
        there, where = torch.cuda.get_device_properties(0).total_memory / GIB, "of the GPU"
    else:
        there, where = (
            psutil.virtual_memory().available / GIB,
            "free here; the plan is one for a GPU, and there is none",
        )

    # Compare.
    words = f"{needed:.1f} GiB planned for each process, at the peak of {stage}; {there:.1f} {where}"
    numbers = {"planned_gib": needed, "there_gib": there}
    if needed <= there:
        return Diagnosis("memory of a run", State.OK, words, numbers)
    state = State.WRONG if gpu is not None or torch.cuda.is_available() else State.NOTE
    return Diagnosis("memory of a run", state, f"{words}; rlcm-fast plan says what to change", numbers)


def disk_room(config: Config, planned: dict[str, Any], num_processes: int, download_gb: float) -> list[Diagnosis]:
    """Compares what a run writes and downloads with the free disk; where both go to one disk, they are added up."""
    run_gb = written_gb(config, planned["bytes"], num_processes)
    run_dir, cache = _existing(Path(config.run_dir)), _existing(Path(constants.HF_HUB_CACHE))
    if download_gb == 0:
        return [_disk("disk of the run", config.run_dir, run_dir, run_gb)]
    if run_dir.stat().st_dev == cache.stat().st_dev:
        return [_disk("disk", f"{config.run_dir} and the hub's cache", run_dir, run_gb + download_gb)]
    return [
        _disk("disk of the run", config.run_dir, run_dir, run_gb),
        _disk("disk of the hub's cache", constants.HF_HUB_CACHE, cache, download_gb),
    ]


def written_gb(config: Config, parts: dict[str, int], num_processes: int) -> float:
    """GB of a run's checkpoints and export: weights, master copy, optimizer states and average of all processes.

    While a checkpoint is written, the oldest is still there.
    """
    of_process = sum(parts.get(name, 0) for name in ("weights", "master", "moments", "ema"))
    shares = num_processes if config.engine.zero_stage > 0 else 1
    export = sum(parts.get(name, 0) for name in ("weights", "vae", "text_encoders"))
    return (of_process * shares * (config.checkpoint.keep + 1) + export) / GB


def _disk(what: str, name: str, place: Path, needed: float) -> Diagnosis:
    free = shutil.disk_usage(place).free / GB
    words = f"{name} takes about {needed:.2g} GB of {free:.3g} GB free"
    state = State.OK if needed <= free else State.WRONG
    remedy = "" if needed <= free else "; free some, or lower checkpoint.keep"
    return Diagnosis(what, state, words + remedy, {"needed_gb": needed, "free_gb": free})


def _existing(path: Path) -> Path:
    """The nearest folder that exists: what is missing will be made in it."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
