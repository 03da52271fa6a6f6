"""Words what ended a run in one line: what happened, the way out, and the note on what was saved."""

from __future__ import annotations

import contextlib
import traceback
from pathlib import Path

import torch

from rlcm_fast import parallel
from rlcm_fast.config import Config
from rlcm_fast.config.batches import next_smaller, with_numbers
from rlcm_fast.faults import Fault
from rlcm_fast.run_folder.checkpoint import is_full_disk
from rlcm_fast.run_folder.noted_batches import noted

TRACEBACK = "error.txt"


def explain(error: BaseException, config: Config) -> str:
    """Returns the line; an error that nobody foresaw also leaves its traceback in the run's folder."""
    happened = _foreseen(error, config) or f"{type(error).__name__}: {first_line(error)}{_kept(error, config)}"
    return "; ".join([happened, *getattr(error, "__notes__", [])])


def _foreseen(error: BaseException, config: Config) -> str | None:
    """Returns what happened and the way out, if neither the config nor the code is to blame; else None."""
    if isinstance(error, Fault):
        return str(error)
    if is_full_disk(error):
        space = "free some space, raise the quota or ulimit, or lower checkpoint.keep"
        return f"run_dir={config.run_dir} is on a full disk: {space}"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return f"out of memory ({first_line(error)}): {_smaller(config)}; rlcm-fast plan says what fits"
    lost = parallel.lost_process(error)
    return lost and f"another process of the run was lost ({lost})"


def _smaller(config: Config) -> str:
    """Returns what to lower, with the next sizes that divide evenly."""
    config = with_numbers(noted(config), parallel.world_size())
    sizes = config.update.micro_batch_size, config.rollout.micro_batch_size
    next_sizes = next_smaller(config, parallel.world_size())
    names = "update.micro_batch_size", "rollout.micro_batch_size"
    lower = [
        f"{name}={size}" + (f" to {smaller}" if smaller else "")
        for name, size, smaller in zip(names, sizes, next_sizes, strict=True)
    ]
    return f"lower {' or '.join(lower)}"


def _kept(error: BaseException, config: Config) -> str:
    """Writes the traceback into the run's folder and returns the words that name the file; "" if it cannot."""
    if config.debug:
        return ""
    name = TRACEBACK if parallel.is_main() else f"rank_{parallel.rank()}_{TRACEBACK}"
    file = Path(config.run_dir) / name
    with contextlib.suppress(OSError):
        file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        return f" ({file} has the traceback)"
    return ""


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
