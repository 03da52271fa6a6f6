"""Writes what runs have come to as one HTML file, from what lies in their folders; docs/report.md shows it.

read_run (reading) -> verdict, charts, pictures, settings, groups -> render (page) -> one file
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlcm_fast.report.page import render
from rlcm_fast.report.reading import RunData, read_run
from rlcm_fast.report.verdict import Verdict, verdict

__all__ = ["RunData", "Verdict", "read_run", "read_runs", "render", "verdict", "write_report"]


def read_runs(folders: Sequence[Path]) -> list[RunData]:
    """Reads run folders, each once, however often and by whatever path it is named.

    Runs whose folders have equal names are called by as much of their paths as tells them apart.

    Raises:
        ValueError: a folder holds no run.
    """
    strange = next((folder for folder in folders if not folder.is_dir()), None)
    if strange is not None:
        raise ValueError(f"run={strange} is not a folder; give the run_dir of a run")
    by_path: dict[Path, Path] = {}
    for folder in folders:
        by_path.setdefault(folder.resolve(), folder)
    return [read_run(folder, _name(path, list(by_path))) for path, folder in by_path.items()]


def _name(path: Path, paths: Sequence[Path]) -> str:
    """Returns the shortest end of a whole path that no other of the paths has."""
    for depth in range(1, len(path.parts)):
        if sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) == 1:
            return "/".join(path.parts[-depth:])
    return str(path)


def write_report(runs: Sequence[RunData], out: Path) -> None:
    """Writes the page at once: a reader sees the old one or the new one; raises OSError if it cannot be written."""
    page = render(runs)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
