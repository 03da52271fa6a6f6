"""Start-up time and memory of a prompt file of millions of lines, and resuming far into it; needs Linux.

    python benchmarks/prompts_at_scale.py --out benchmarks/results/prompts_at_scale

Writes a .txt and a .jsonl file of --lines prompts, and for each, in a fresh process that has imported torch: the
sampler of a run and its first batch (what a start waits for; the file is dropped from the page cache before), the
growth of the resident memory by then, batches, and a second sampler that goes on after --iterations. Targets: the
start in 5 s, 200 MB. Writes OUT.json, which is also the last line on stdout.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reporting import print_summary

_START_SECONDS, _MEMORY_MB = 5.0, 200.0
_WORDS = ("a", "the", "red", "old", "cat", "dog", "castle", "photo", "of", "under", "beside", "painting", "caf\xe9")


def main() -> int:
    arguments = _parser().parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for suffix in (".txt", ".jsonl"):
            path = Path(folder) / f"prompts{suffix}"
            write_prompts(path, arguments.lines)
            with multiprocessing.get_context("spawn").Pool(1) as pool:  # a process of its own
                rows.append(pool.apply(measure, (path, arguments.num_prompts, arguments.iterations)))
            path.unlink()
    path = arguments.out.with_suffix(".json") if arguments.out else None
    print_summary(summarise(rows, arguments.lines), path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=5_000_000, help="of each file (default 5,000,000)")
    parser.add_argument("--num-prompts", type=int, default=128, help="of an iteration (default 128)")
    parser.add_argument("--iterations", type=int, default=100_000, help="to resume after (default 100,000)")
    parser.add_argument("--folder", help="for the files, about 1 GB; left out: the system's for temporary files")
    parser.add_argument("--out", type=Path, help="OUT.json is written; left out: stdout only")
    return parser


def write_prompts(path: Path, lines: int) -> None:
    """Distinct prompts of 6 to 20 words, no line break within; the same for the same number."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            text = " ".join([*generator.choices(_WORDS, k=5 + number % 15), str(number)])
            file.write((text if path.suffix == ".txt" else json.dumps({"text": text})) + "\n")
        file.flush()
        os.fsync(file.fileno())


def measure(path: Path, num_prompts: int, iterations: int) -> dict[str, Any]:
    """One file, in this process, which should be a fresh one."""
    from rlcm_fast.prompts import Share, build_sampler

    _drop_from_page_cache(path)
    before, start = _memory_mb("VmRSS"), time.perf_counter()
    sampler = build_sampler(str(path), Share(num_prompts, 1, seed=0))
    sampler.next_batch()
    start_seconds, held, peak = time.perf_counter() - start, _memory_mb("VmRSS"), _memory_mb("VmHWM")
    batches = list(_seconds_of_batches(sampler.next_batch, 100))

    start = time.perf_counter()
    state = {**sampler.state_dict(), "num_batches": iterations}
    resumed = build_sampler(str(path), Share(num_prompts, 1, seed=0))
    resumed.load_state_dict(state)
    resumed.next_batch()
    return {
        "file": path.suffix,
        "file_mb": path.stat().st_size / 1e6,
        "start_seconds": start_seconds,
        "memory_growth_mb": held - before,
        "memory_growth_at_peak_mb": peak - before,
        "batch_ms_median": 1e3 * statistics.median(batches),
        "resume_seconds": time.perf_counter() - start,
        "memory_growth_at_end_mb": _memory_mb("VmRSS") - before,  # with both samplers
    }


def _seconds_of_batches(next_batch: Any, count: int) -> Iterator[float]:
    for _ in range(count):
        start = time.perf_counter()
        next_batch()
        yield time.perf_counter() - start


def _memory_mb(field: str) -> float:
    """Of this process: VmRSS what is resident, VmHWM the most that ever was."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in status.splitlines() if line.startswith(f"{field}:"))


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summarise(rows: list[dict[str, Any]], lines: int) -> dict[str, Any]:
    """With the targets, and whether every file meets them."""
    met = all(row["start_seconds"] < _START_SECONDS and row["memory_growth_at_peak_mb"] < _MEMORY_MB for row in rows)
    targets = {"start_seconds": _START_SECONDS, "memory_growth_at_peak_mb": _MEMORY_MB}
    return {"lines": lines, "targets": targets, "targets_met": met, "files": rows}


if __name__ == "__main__":
    sys.exit(main())
