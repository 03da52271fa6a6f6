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
    """Reads run folders; raises ValueError if one holds no run.

    Folders with equal names are called by as much of their paths as tells them apart.
    """
    strange = next((folder for folder in folders if not folder.is_dir()), None)
    if strange is not None:
        raise ValueError(f"run={strange} is not a folder; give the run_dir of a run")
    paths = [folder.resolve() for folder in dict.fromkeys(folders)]
    depth = 1
    while len({path.parts[-depth:] for path in paths}) < len(paths) and depth < max(len(p.parts) for p in paths):
        depth += 1
    return [read_run(folder, "/".join(path.parts[-depth:])) for folder, path in zip(dict.fromkeys(folders), paths)]


def write_report(runs: Sequence[RunData], out: Path) -> None:
    """Writes the page at once: a reader sees the old one or the new one; raises OSError if it cannot be written."""
    page = render(runs)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, out)
    finally:
        unfinished.unlink(missing_ok=True)
