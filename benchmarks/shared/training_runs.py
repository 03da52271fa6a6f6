"""Training runs as subprocesses, one a seed, and their metrics as curves.

A run that is finished (it has an export) is not repeated, one that was cut off goes on from its last checkpoint, and
one of other settings is refused. Lines of metrics.jsonl become rows whose `queries` and `seconds` are what had been
spent on the weights that the row's numbers describe: line i holds the rollout and the evaluation of the weights after
i iterations, so the first row stands at 0. Seconds are the sum of seconds/iteration: start-up, evaluation and
checkpoints are left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.reporting import ROOT

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

Row = dict[str, Any]
_OWN = ("seed", "run_dir", "resume", "dry_run")


def add_config_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """--config and --override."""
    parser.add_argument("--config", default=config, help=f"default {config}")
    add_override_argument(parser)


def add_override_argument(parser: argparse.ArgumentParser) -> None:
    """--override."""
    text = "pairs of a dotted config field and its value, as: num_iterations 10 update.clip_range 2e-4"
    parser.add_argument("--override", nargs="+", action="extend", default=[], metavar="FIELD VALUE", help=text)


def read_config(arguments: argparse.Namespace, *options: str) -> Config:
    """The config of `add_config_arguments` for one process; `options` of train.py come last.

    Raises:
        ValueError: it is not valid.
    """
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate

    config = parse_config(["--config", arguments.config, *override_options(arguments.override), *options])
    validate(config, 1)
    return config


def add_run_arguments(parser: argparse.ArgumentParser, config: str) -> None:
    """Adds the options of `add_config_arguments` and of `add_seed_arguments`."""
    add_config_arguments(parser, config)
    add_seed_arguments(parser)


def add_seed_arguments(parser: argparse.ArgumentParser) -> None:
    """--seeds, --runs and --jobs."""
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (default 0 1 2)")
    parser.add_argument("--runs", type=Path, help="folder of the run folders (default runs/ and the name of --out)")
    text = (
        "runs at a time, each with its share of the cores and its output in RUN.log (default 1: all cores, and a bar)"
    )
    parser.add_argument("--jobs", type=int, default=1, help=text)


def train_arguments(config: str, overrides: Sequence[str], seed: int, run_dir: Path) -> list[str]:
    """The arguments of train.py; `overrides` are pairs of field and value."""
    options = override_options(overrides)
    for field in overrides[::2]:
        if field in _OWN:
            raise ValueError(f"override={field} is set by the benchmark; use --seeds and --runs")
    return ["--config", config, *options, "--seed", str(seed), "--run_dir", str(run_dir)]


def override_options(overrides: Sequence[str]) -> list[str]:
    """Pairs of field and value as options of train.py."""
    if len(overrides) % 2:
        raise ValueError(f"override={' '.join(overrides)} must be pairs of field and value")
    options = []
    for field, value in zip(overrides[::2], overrides[1::2], strict=True):
        options += [f"--{field}", value]
    return options


@contextmanager
def temporary_trainer(config: Config, num_iterations: int) -> Iterator[Trainer]:
    """A trainer whose run folder is thrown away."""
    from rlcm_fast.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        yield Trainer(replace(config, run_dir=f"{folder}/run", num_iterations=num_iterations, resume=None))


def train_all(runs: Mapping[Path, Sequence[str]], jobs: int) -> None:
    """`train` for each run folder and its arguments, `jobs` of them at a time.

    Raises:
        ValueError: a folder holds a run of other settings (then nothing is begun); or of a run that failed, after those
            beside it have ended, and what has not started is not begun.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs} must be at least 1")
    for folder, arguments in runs.items():
        _refuse_other_settings(arguments, folder)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, arguments, folder, jobs) for folder, arguments in runs.items()]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def train(arguments: Sequence[str], run_dir: Path, jobs: int = 1) -> None:
    """Runs train.py to its end, unless the run in `run_dir` is finished already; goes on with a half-done one.

    With several `jobs` it takes its share of the cores, and what it prints goes to `<run_dir>.log`.

    Raises:
        ValueError: training failed.
    """
    is_begun = (run_dir / "config.yaml").exists()
    if is_finished(run_dir):
        print(f"{run_dir} is finished", file=sys.stderr)
        return
    resume = ["--resume", "latest"] if is_begun else []
    start = time.perf_counter()
    done = _run([sys.executable, str(ROOT / "rlcm_fast" / "train.py"), *arguments, *resume], run_dir, jobs)
    if done.returncode != 0 or not is_finished(run_dir):
        raise ValueError(f"training in {run_dir} ended early (exit code {done.returncode}); the same command goes on")
    if not is_begun:  # a run in pieces has no such number
        (run_dir / "wall_seconds.json").write_text(json.dumps(time.perf_counter() - start))


def _run(command: Sequence[str], run_dir: Path, jobs: int) -> subprocess.CompletedProcess[bytes]:
    if jobs == 1:
        return subprocess.run(command, check=False)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    with run_dir.with_name(f"{run_dir.name}.log").open("ab") as log:
        return subprocess.run(command, check=False, env=environment, stdout=log, stderr=log)


def is_finished(run_dir: Path) -> bool:
    """The export is the last thing a run writes, and its index the last file of it."""
    return (run_dir / "export" / "model_index.json").exists()


def wall_seconds(run_dir: Path) -> float | None:
    """From the start of the process to its end, everything included; None for a run in pieces."""
    path = run_dir / "wall_seconds.json"
    return json.loads(path.read_text()) if path.exists() else None


def curve(run_dir: Path, seed: int) -> list[Row]:
    """One row an iteration of metrics.jsonl: seed, iteration, queries, seconds, each mean of reward/* and eval/*.

    Of two lines of an iteration the last counts: a rated run writes its last line once more, with the last answers.
    """
    rows: list[Row] = []
    queries, seconds = 0, 0.0
    for text in (run_dir / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        kept = {key: value for key, value in line.items() if _is_curve(key)}
        if rows and rows[-1]["iteration"] == line["iteration"]:
            rows.pop()
        rows.append({"seed": seed, "iteration": line["iteration"], "queries": queries, "seconds": seconds, **kept})
        queries = line["queries"]
        seconds += line.get("seconds/iteration", 0.0)
    return rows


def evaluated(rows: Sequence[Row], metric: str, until_seconds: float = float("inf")) -> list[Row]:
    """The rows that hold `metric`, up to that much training time."""
    return [row for row in rows if row.get(metric) is not None and row["seconds"] <= until_seconds]


def eval_metrics(rows: Sequence[Row]) -> list[str]:
    """The keys eval/... of all rows, in order of first appearance."""
    keys = dict.fromkeys(itertools.chain(*rows))
    return [key for key in keys if key.startswith("eval/")]


def mean_and_spread(
    curves: Sequence[Sequence[Row]], metric: str, x: str
) -> tuple[list[float], list[float], list[float]]:
    """x, mean and standard deviation over seeds of `metric`, at the iterations that all seeds have evaluated.

    x ("seconds" or "queries") is the mean over seeds at that iteration.
    """
    rows_at: dict[int, list[Row]] = {}  # iteration -> its row in each seed that evaluated it
    for row in itertools.chain(*(evaluated(rows, metric) for rows in curves)):
        rows_at.setdefault(row["iteration"], []).append(row)
    xs, means, spreads = [], [], []
    for _, rows in sorted(rows_at.items()):
        if len(rows) == len(curves):
            xs.append(sum(row[x] for row in rows) / len(rows))
            mean, spread = _mean_and_deviation([row[metric] for row in rows])
            means.append(mean)
            spreads.append(spread)
    return xs, means, spreads


def _mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, variance**0.5


def at(rows: Sequence[Row], metric: str, x: str, place: float) -> float:
    """`metric` where `x` is `place`, linear between evaluations, constant beyond them."""
    points = [(row[x], row[metric]) for row in evaluated(rows, metric)]
    for (x_0, y_0), (x_1, y_1) in itertools.pairwise(points):
        if x_0 <= place <= x_1 and x_1 > x_0:
            return y_0 + (y_1 - y_0) * (place - x_0) / (x_1 - x_0)
    return points[-1][1] if place > points[-1][0] else points[0][1]


def _is_curve(key: str) -> bool:
    return key == "eval/diversity" or (key.startswith(("reward/", "eval/")) and key.endswith("/mean"))


def _refuse_other_settings(arguments: Sequence[str], run_dir: Path) -> None:
    """Raises ValueError where `run_dir` already holds a run of other settings."""
    if not (run_dir / "config.yaml").exists():
        return
    import yaml

    from rlcm_fast.config import parse_config, to_dict

    wanted, found = to_dict(parse_config(arguments)), yaml.safe_load((run_dir / "config.yaml").read_text())
    for field, value, other in _differences(wanted, found):
        if field not in ("resume", "dry_run"):
            raise ValueError(
                f"{run_dir} holds a run with {field}={other}, but {field}={value} was asked for; delete that folder, "
                "or give another --runs"
            )


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any], at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields the dotted fields that differ, with both values; a run notes what it has found in place of `auto`."""
    for name in {**wanted, **found}:
        value, other = wanted.get(name), found.get(name)
        if isinstance(value, dict) and isinstance(other, dict):
            yield from _differences(value, other, f"{at}{name}.")
        elif value not in ("auto", other):
            yield f"{at}{name}", value, other
