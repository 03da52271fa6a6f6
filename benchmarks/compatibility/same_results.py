"""Whether a change of the code left every number as it was: small runs by an old commit and by this tree, bit for bit.

    python benchmarks/compatibility/same_results.py OLD_COMMIT --jobs 2 --cache runs/same_results
    python benchmarks/compatibility/same_results.py OLD_COMMIT --only resume two_processes_zero_1
    python benchmarks/compatibility/same_results.py --list

Use it before a refactor is merged: OLD_COMMIT is the commit before it. `git archive` unpacks that commit into a
temporary folder, so your checkout stays as it is; "this tree" is the checkout with its uncommitted changes. Each case
of training_cases.py is `python rlcm_fast/train.py` in a process of its own (or two), on the CPU with one thread, from
either tree's root. A case that resumes is begun by the old tree; each tree goes on with a copy of that run folder.

run_differences.py compares metrics.jsonl (without times and memory), all weights of export and checkpoints, state.json
and the grids. Prints a line a case, writes OUT (JSON); the exit code is 1 where anything differs.

Takes about 20 seconds a case and tree, 10 minutes for all of them with --jobs 2 on two idle cores; with --cache, in
which the old tree's runs are kept for later comparisons, half of that from the second time on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.compatibility.run_differences import compared_files, first_difference
from benchmarks.compatibility.training_cases import CASES, Case
from benchmarks.shared.reporting import ROOT, machine, print_summary
from benchmarks.shared.run_processes import OF_A_LAUNCHER, free_port

_SECONDS = 600.0  # after which a process hangs


class TrainingFailed(Exception):
    """A run ended with another exit code than 0."""


@dataclass(frozen=True)
class Outcome:
    """How a case went."""

    case: str
    difference: str  # empty: the same
    seconds: float


def main() -> int:
    arguments = _parser().parse_args()
    try:
        cases = chosen_cases(arguments.only)
        if arguments.list:
            _print_cases(cases)
            return 0
        commit = full_commit(arguments.commit)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as scratch, unpacked(commit) as old_tree:
        comparison = Comparison(commit, old_tree, Path(scratch), arguments.cache or Path(scratch) / "cache")
        outcomes = comparison.run(cases, arguments.jobs)
    differing = [outcome.case for outcome in outcomes if outcome.difference]
    summary = {"commit": commit, "cases": len(outcomes), "differing": differing}
    print_summary({**summary, "outcomes": [asdict(outcome) for outcome in outcomes]}, arguments.out)
    return 1 if differing else 0


class Comparison:
    """Trains each case by the old tree and by this one, and compares what they leave."""

    def __init__(self, commit: str, old_tree: Path, scratch: Path, cache: Path) -> None:
        self._old_tree, self._scratch = old_tree, scratch
        self._cache = cache.resolve() / commit[:12]
        for tree in (old_tree, ROOT):
            check_import(tree)

    def run(self, cases: Sequence[Case], jobs: int) -> list[Outcome]:
        """Compares the cases, `jobs` of them at a time, and prints each when it is done."""
        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(self._compare, cases))

    def _compare(self, case: Case) -> Outcome:
        start = time.perf_counter()
        new = self._scratch / case.name
        try:
            kept = self._old_run(case)
            _train(ROOT, case, new, kept / "begun" if case.resumes_after else None)
            difference = first_difference(kept / "run", new)
        except TrainingFailed as error:
            difference = str(error)
        shutil.rmtree(new, ignore_errors=True)
        outcome = Outcome(case.name, difference, round(time.perf_counter() - start, 1))
        print(f"{case.name:22} {outcome.seconds:6.1f} s  {difference or 'same'}", flush=True)
        return outcome

    def _old_run(self, case: Case) -> Path:
        """The folder with the old tree's `run` and, where the case resumes, `begun`; trains what is not there yet."""
        kept = self._cache / f"{case.name}_{_fingerprint(case)}"
        if kept.exists():
            return kept
        unfinished = kept.with_name(f".{kept.name}_{os.getpid()}")
        shutil.rmtree(unfinished, ignore_errors=True)
        begun = unfinished / "begun" if case.resumes_after else None
        if begun:
            _train(self._old_tree, case, begun, num_iterations=case.resumes_after)
        _train(self._old_tree, case, unfinished / "run", begun)
        _drop_what_is_not_compared(unfinished / "run")
        unfinished.replace(kept)
        return kept


def _train(tree: Path, case: Case, run_dir: Path, begun: Path | None = None, num_iterations: int = 0) -> None:
    """Trains a case by the code in `tree`; `begun`: the run folder of which a copy is resumed.

    Raises:
        TrainingFailed: with the last line of what the failed process printed.
    """
    # The options, and the folder to go on in.
    options = [*case.options(), "--run_dir", str(run_dir)]
    if num_iterations:
        options += ["--num_iterations", str(num_iterations)]
    if begun:
        shutil.copytree(begun, run_dir)
        options += ["--resume", "latest"]
        if tree == ROOT:  # the old tree may have pickled it, and may not know the field
            options += ["--trust_old_checkpoint", "true"]
    run_dir.parent.mkdir(parents=True, exist_ok=True)

    # A process for each rank, with a log of its own.
    port = str(free_port())
    logs = [run_dir.with_name(f"{run_dir.name}_{rank}.log") for rank in range(case.processes)]
    processes = []
    for rank, log in enumerate(logs):
        environment = {**environment_of(tree), **_place_of(rank, case.processes, port)}
        with log.open("wb") as file:
            command = [sys.executable, "rlcm_fast/train.py", *options]
            processes.append(subprocess.Popen(command, cwd=tree, env=environment, stdout=file, stderr=file))

    # All must end well.
    codes = _exit_codes(processes)
    for code, log in zip(codes, logs, strict=True):
        if code != 0:
            lines = log.read_text(errors="replace").strip().splitlines()
            side = "this tree" if tree == ROOT else "the old tree"
            raise TrainingFailed(f"{side} ended with exit code {code}: {lines[-1] if lines else 'without a word'}")


def _place_of(rank: int, processes: int, port: str) -> dict[str, str]:
    """What a launcher tells a process; nothing where there is one alone, which needs no launcher."""
    if processes == 1:
        return {}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
    return {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def _exit_codes(processes: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Waits for all; what is left when one has failed, or after ten minutes, is killed."""
    until = time.monotonic() + _SECONDS
    while any(process.poll() is None for process in processes):
        has_failed = any(process.poll() not in (None, 0) for process in processes)
        if has_failed or time.monotonic() > until:
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.wait() for process in processes]


def environment_of(tree: Path) -> dict[str, str]:
    """Our environment, with the code of `tree`, one thread, no GPU and no launcher."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_LAUNCHER}
    return {**kept, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def check_import(tree: Path) -> None:
    """Makes sure that a process in `tree` runs the code in `tree`, kernels included, and no installed one."""
    script = "import rlcm_fast, rlcm_fast.kernels.functional as kernels; print(rlcm_fast.__file__, kernels.__file__)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tree, env=environment_of(tree), capture_output=True, text=True, check=True)
    for name in done.stdout.split():
        assert Path(name).resolve().is_relative_to(tree.resolve()), f"{name} is not in {tree}"


def _drop_what_is_not_compared(run_dir: Path) -> None:
    """DeepSpeed's files are most of a run folder."""
    kept = set(compared_files(run_dir))
    for path in run_dir.rglob("*"):
        if path.is_file() and path.relative_to(run_dir) not in kept:
            path.unlink()


def _fingerprint(case: Case) -> str:
    """What else the old tree's numbers hang on: the case, torch and the machine."""
    text = json.dumps([asdict(case), version("torch"), version("deepspeed"), machine()], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def full_commit(name: str | None) -> str:
    """The hash that a name of a commit stands for."""
    if name is None:
        raise ValueError("commit is missing; name the commit before the change, as HEAD~1")
    command = ["git", "-C", str(ROOT), "rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"commit={name} is no commit of this repository; name one of `git log`")
    return done.stdout.strip()


@contextmanager
def unpacked(commit: str) -> Iterator[Path]:
    """A temporary folder with the files of a commit."""
    command = ["git", "-C", str(ROOT), "archive", commit]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="tar")
        yield Path(folder)


def chosen_cases(names: Sequence[str]) -> list[Case]:
    """The cases of these names, or all of them."""
    known = [case.name for case in CASES]
    for name in names:
        if name not in known:
            raise ValueError(f"only={name} is no case; the cases are {', '.join(known)}")
    return [case for case in CASES if not names or case.name in names]


def _print_cases(cases: Sequence[Case]) -> None:
    for case in cases:
        processes = "two processes" if case.processes == 2 else "one process"
        resumes = f", resumed after {case.resumes_after} iterations" if case.resumes_after else ""
        print(f"{case.name} ({processes}{resumes}): {' '.join(case.options())}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", nargs="?", metavar="OLD_COMMIT", help="the commit to compare with")
    parser.add_argument("--only", nargs="*", default=[], metavar="CASE", help="these cases alone")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (default 1)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="where the old tree's runs are kept")
    parser.add_argument("--out", type=Path, metavar="OUT.json", help="the outcomes as JSON")
    parser.add_argument("--list", action="store_true", help="print the cases with their options and stop")
    return parser


if __name__ == "__main__":
    sys.exit(main())
