"""Words what ended a run: out of memory, a full disk, a lost process; and keeps the traceback of other errors."""

from __future__ import annotations

import contextlib
import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from rlcm_fast import parallel
from rlcm_fast.config import Config
from rlcm_fast.config.batches import next_smaller, with_numbers
from rlcm_fast.run_folder.checkpoint import is_full_disk
from rlcm_fast.run_folder.noted_batches import noted

TRACEBACK = "error.txt"


@dataclass(frozen=True)
class WordsOfRun:
    """What a run knows of its errors, for the door."""

    config: Config

    def foreseen(self, error: BaseException) -> str | None:
        """Returns what happened and the way out, if neither the config nor the code is to blame; else None."""
        config = self.config
        if is_full_disk(error):
            space = "free some space, raise the quota or ulimit, or lower checkpoint.keep"
            return f"run_dir={config.run_dir} is on a full disk: {space}"
        if isinstance(error, torch.OutOfMemoryError | MemoryError):
            return f"out of memory ({first_line(error)}): {_smaller(config)}; rlcm-fast plan says what fits"
        lost = parallel.lost_process(error)
        return lost and f"another process of the run was lost ({lost})"

    def kept(self, error: BaseException) -> str:
        """Writes the traceback into the run's folder and returns the words that name the file; "" if it cannot."""
        name = TRACEBACK if parallel.is_main() else f"rank_{parallel.rank()}_{TRACEBACK}"
        file = Path(self.config.run_dir) / name
        with contextlib.suppress(OSError):
            file.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
            return f"; {file} has the traceback"
        return ""


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


def first_line(error: BaseException) -> str:
    """Returns the first line of the error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
