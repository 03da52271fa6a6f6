"""The tables of bench_full_size.py, which grow from slice to slice: rows of other modes and sizes stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import machine

TABLES = {  # what the CSV files hold, and what tells rows of one slice from another
    "": ("modes", ("compile",)),
    "_stages": ("stages", ("compile",)),
    "_micro_batches": ("micro_batches", ("micro_batch_size",)),
    "_inference": ("inference", ("compile",)),
}


def earlier_rows(file: Path, summary: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The rows of the tables in `file`, if it is of the same config, overrides, FLOPs and machine; or none."""
    nothing: dict[str, list[dict[str, Any]]] = {key: [] for key, _ in TABLES.values()}
    if not file.exists():
        return nothing
    known = json.loads(file.read_text(encoding="utf-8"))
    if any(known.get(key) != value for key, value in {"machine": machine(), **summary}.items()):
        return nothing
    return {key: known.get(key, []) for key in nothing}


def put_rows(summary: dict[str, Any], table: str, rows: Sequence[dict[str, Any]]) -> None:
    """Adds rows to a table, in the place of rows of the same mode or size."""
    names = next(names for key, names in TABLES.values() if key == table)
    new = {tuple(row[name] for name in names) for row in rows}
    kept = [row for row in summary[table] if tuple(row[name] for name in names) not in new]
    summary[table] = [*kept, *rows]
