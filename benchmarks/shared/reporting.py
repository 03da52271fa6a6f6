"""What benchmarks share: CSV files, the JSON document on the last line, statistics over seeds, the machine's name."""

from __future__ import annotations

import csv
import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def mean_and_error(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and standard error of the mean; the error of one value is not known: None."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error}


def percentile(values: Sequence[float], share: float) -> float:
    """The `share` quantile, 0 to 1, linear between neighbours."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    lower = int(position)
    upper = min(lower + 1, len(ordered) - 1)
    return ordered[lower] + (position - lower) * (ordered[upper] - ordered[lower])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; the columns are the keys of all rows in order of first appearance, a missing value is empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def print_summary(summary: Mapping[str, Any], path: Path | None = None) -> None:
    """The benchmark's last line on stdout: one JSON document with machine, command and threads; also at `path`."""
    document = {**summary, "machine": machine(), "command": command(), "threads": num_threads()}
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(document), flush=True)


def machine() -> str:
    """Names the machine, e.g. "Intel(R) Xeon(R) ..., 2 cores", and its GPU if torch is loaded and has one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    torch = sys.modules.get("torch")
    gpu = f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}"


def command() -> str:
    """What was typed, from the repository's root."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if ROOT in script.parents else script.name
    return shlex.join(["python", str(shown), *sys.argv[1:]])


def num_threads() -> int:
    """Threads of one operation of torch; where torch is not loaded, what OMP_NUM_THREADS allows."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch is not None else int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
