"""Start-up time and memory of millions of prompts in a file or a streamed folder, and resuming in them; needs Linux.

    python benchmarks/speed/prompts_at_scale.py --out benchmarks/results/prompts_at_scale

Sources of --lines prompts: a .txt and a .jsonl file, and as hf: sources, which the package datasets streams, a folder
with that .jsonl file (hf:jsonl) and one of --shards parquet files (hf:parquet), each a single row group. For each, in
a fresh process that has imported torch: the sampler of a run and its first batch (what a start waits for; the files
are dropped from the page cache before), and the growth of the resident memory. Of files also batches and a second
sampler that goes on after --iterations; of folders also the import of datasets by itself, which counts as a part of
both, batches until the cursor is in the middle, with the peak until there, and another fresh process that goes on from
there and must draw what comes next; a folder's start is the fastest of five, each in its own process. Targets: the
start in 5 s, 200 MB. Writes OUT.json, which is also the last line on stdout.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import print_summary

_KINDS = (".txt", ".jsonl", "hf:jsonl", "hf:parquet")
_STARTS = 5  # of a folder, of which the fastest is taken: an import of 900 modules waits for whatever else runs
_START_SECONDS, _MEMORY_MB = 5.0, 200.0
_WORDS = ("a", "the", "red", "old", "cat", "dog", "castle", "photo", "of", "under", "beside", "painting", "caf\xe9")


def main() -> int:
    arguments = _parser().parse_args()
    rows = []
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            os.environ["HF_DATASETS_CACHE"] = f"{folder}/cache"  # for the processes to come
            rows.append(_row(kind, Path(folder), arguments))
    path = arguments.out.with_suffix(".json") if arguments.out else None
    print_summary(summarise(rows, arguments.lines), path)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=_KINDS, default=_KINDS, help="of sources (default all)")
    parser.add_argument("--lines", type=int, default=5_000_000, help="of each source (default 5,000,000)")
    parser.add_argument("--shards", type=int, default=10, help="of hf:parquet (default 10)")
    parser.add_argument("--num-prompts", type=int, default=128, help="of an iteration (default 128)")
    parser.add_argument("--iterations", type=int, default=100_000, help="of a file, to resume after (default 100,000)")
    parser.add_argument("--folder", help="for the files, about 1 GB; left out: the system's for temporary files")
    parser.add_argument("--out", type=Path, help="OUT.json is written; left out: stdout only")
    return parser


def _row(kind: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The row of one source, which is written into `folder`."""
    if kind.startswith("."):
        path = folder / f"prompts{kind}"
        write_prompts(path, arguments.lines)
        return _in_a_process(measure, path, arguments.num_prompts, arguments.iterations)
    data = folder / "data"
    write_folder(data, kind, arguments.lines, arguments.shards)
    num_prompts, iterations = arguments.num_prompts, arguments.lines // 2 // arguments.num_prompts
    starts = []
    for _ in range(_STARTS - 1):
        short, _, _ = _in_a_process(measure_stream, data, num_prompts, 2)
        starts.append(short["start_seconds"])
    row, state, expected = _in_a_process(measure_stream, data, num_prompts, iterations)
    starts.append(row["start_seconds"])
    resumed = _in_a_process(resume_stream, data, num_prompts, state, expected)
    return {"file": kind, **row, "start_seconds": min(starts), "start_seconds_of_each": starts, **resumed}


def _in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def write_folder(folder: Path, kind: str, lines: int, shards: int) -> None:
    """The prompts of `write_prompts` as a dataset; parquet's have a second column, which nothing should read."""
    from pyarrow import parquet, table

    folder.mkdir()
    path = folder / "prompts.jsonl"
    write_prompts(path, lines)
    if kind == "hf:parquet":
        with path.open(encoding="utf-8") as file:
            for shard in range(shards):
                count = lines * (shard + 1) // shards - lines * shard // shards
                texts = [json.loads(line)["text"] for line in itertools.islice(file, count)]
                columns = {"text": texts, "other": [text[::-1] for text in texts]}
                parquet.write_table(table(columns), folder / f"{shard:05d}.parquet", row_group_size=count)
        path.unlink()


def write_prompts(path: Path, lines: int) -> None:
    """Distinct prompts of 6 to 20 words, no line break within; the same for the same number."""
    generator = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for number in range(lines):
            text = " ".join([*generator.choices(_WORDS, k=5 + number % 15), str(number)])
            line = text if path.suffix == ".txt" else json.dumps({"text": text})
            file.write(f"{line}\n")
        file.flush()
        os.fsync(file.fileno())


def measure(path: Path, num_prompts: int, iterations: int) -> dict[str, Any]:
    """One file, in this process, which should be a fresh one."""
    from rlcm_fast.prompts import Share, build_sampler

    _drop_from_page_cache(path)
    # A run's start: its sampler and the first batch.
    before, start = _memory_mb("VmRSS"), time.perf_counter()
    sampler = build_sampler(str(path), Share(num_prompts, 1, seed=0))
    sampler.next_batch()
    start_seconds, held, peak = time.perf_counter() - start, _memory_mb("VmRSS"), _memory_mb("VmHWM")
    batches = list(_seconds_of_batches(sampler.next_batch, 100))

    # A second sampler, which goes on where a long run was.
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


def measure_stream(folder: Path, num_prompts: int, iterations: int) -> tuple[dict[str, Any], Any, list[str]]:
    """A streamed folder until after `iterations`, in a fresh process; also the state then and the texts that follow."""
    from rlcm_fast.prompts import Share, build_sampler

    files, load = sorted(folder.iterdir()), os.getloadavg()[0]
    for path in files:
        _drop_from_page_cache(path)

    # A run's start: the import of datasets, the sampler and the first batch.
    before, start, start_cpu = _memory_mb("VmRSS"), time.perf_counter(), time.process_time()
    importlib.import_module("datasets")
    import_seconds, import_mb = time.perf_counter() - start, _memory_mb("VmRSS") - before
    sampler = build_sampler(f"hf:{folder}", Share(num_prompts, 1, seed=0))
    sampler.next_batch()
    row = {
        "file_mb": sum(path.stat().st_size for path in files) / 1e6,
        "num_files": len(files),
        "load_average": load,  # of the machine: above its cores, seconds are not this process's alone
        "start_seconds": time.perf_counter() - start,
        "start_cpu_seconds": time.process_time() - start_cpu,
        "import_seconds": import_seconds,
        "import_memory_growth_mb": import_mb,
        "memory_growth_mb": _memory_mb("VmRSS") - before,
        "memory_growth_at_first_peak_mb": _memory_mb("VmHWM") - before,
    }

    # Batches until the cursor is where the next process goes on.
    batches = list(_seconds_of_batches(sampler.next_batch, iterations - 1))
    row |= {
        "iterations": iterations,
        "batch_ms_median": 1e3 * statistics.median(batches),
        "batch_ms_mean": 1e3 * statistics.fmean(batches),
        "batch_ms_max": 1e3 * max(batches),
        "memory_growth_at_peak_mb": _memory_mb("VmHWM") - before,
    }
    state = sampler.state_dict()
    return row, state, [prompt.text for prompt in sampler.next_batch()]


def resume_stream(folder: Path, num_prompts: int, state: Any, expected: list[str]) -> dict[str, Any]:
    """Goes on from `state`, in a fresh process; `expected`: the texts of the next batch."""
    from rlcm_fast.prompts import Share, build_sampler

    for path in folder.iterdir():
        _drop_from_page_cache(path)
    before = _memory_mb("VmRSS")
    importlib.import_module("datasets")
    start, start_cpu = time.perf_counter(), time.process_time()
    sampler = build_sampler(f"hf:{folder}", Share(num_prompts, 1, seed=0))
    sampler.load_state_dict(state)
    texts = [prompt.text for prompt in sampler.next_batch()]
    assert texts == expected, "the resumed stream draws other prompts"
    return {
        "resume_seconds": time.perf_counter() - start,
        "resume_cpu_seconds": time.process_time() - start_cpu,
        "memory_growth_at_resume_peak_mb": _memory_mb("VmHWM") - before,
    }


def _seconds_of_batches(next_batch: Any, count: int) -> Iterator[float]:
    for _ in range(count):
        start = time.perf_counter()
        next_batch()
        yield time.perf_counter() - start


def _memory_mb(field: str) -> float:
    """Megabytes of this process: VmRSS what is resident, VmHWM the most that ever was."""
    status = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        status[name] = value
    return int(status[field].split()[0]) * 1024 / 1e6


def _drop_from_page_cache(path: Path) -> None:
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def summarise(rows: list[dict[str, Any]], lines: int) -> dict[str, Any]:
    """The summary: the targets, and whether every source meets them, a folder also when it is resumed."""
    met = True
    for row in rows:
        peak = max(row["memory_growth_at_peak_mb"], row.get("memory_growth_at_resume_peak_mb", 0.0))
        met = met and row["start_seconds"] < _START_SECONDS and peak < _MEMORY_MB
    targets = {"start_seconds": _START_SECONDS, "memory_growth_at_peak_mb": _MEMORY_MB}
    return {"lines": lines, "targets": targets, "targets_met": met, "files": rows}


if __name__ == "__main__":
    sys.exit(main())
