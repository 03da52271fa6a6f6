"""Learning curves of one config over several seeds: CSV, picture and summary.

    python benchmarks/learning/learning_curves.py --config configs/shapes/compressibility.yaml --seeds 0 1 2 \\
        --out benchmarks/results/learning/compressibility

writes OUT.csv (one row an iteration and seed), OUT.png (mean and standard deviation over seeds of all that is measured
on held-out prompts, against seconds and queries) and OUT.json, whose content is also the last line on stdout. `seconds`
is training time, the sum of seconds/iteration: start-up, evaluation and checkpoints are left out; `wall_seconds` has
them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.figures import draw_curve, save_figure
from benchmarks.shared.reporting import mean_and_error, print_summary, write_csv
from benchmarks.shared.training_runs import (
    Row,
    add_run_arguments,
    curve,
    eval_metrics,
    evaluated,
    train_all,
    train_arguments,
    wall_seconds,
)

_DETECTOR = "eval/shapes_alignment/mean"
_JPEG_SIGNS = {"eval/jpeg_compressibility/mean": -1.0, "eval/jpeg_incompressibility/mean": 1.0}
_WINDOW = 5  # iterations whose rollout rewards are averaged, at either end


def main() -> int:
    arguments = _parser().parse_args()
    try:
        folders = train_seeds(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    curves = [curve(folder, seed) for seed, folder in folders.items()]
    write_csv(arguments.out.with_suffix(".csv"), list(itertools.chain(*curves)))
    plot(curves, arguments.out.with_suffix(".png"), Path(arguments.config).stem)
    flat = flat_image_kilobytes(arguments.image_size, _jpeg_quality(folders[arguments.seeds[0]]))
    summary: dict[str, Any] = summarise(curves, flat, arguments.within_seconds)
    summary["jobs"] = arguments.jobs
    summary["wall_seconds"] = [wall_seconds(folder) for folder in folders.values()]
    print_summary(summary, arguments.out.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning/compressibility"))
    within = "judge the weights after at most this much training time (default: the last evaluation)"
    parser.add_argument("--within-seconds", type=float, default=float("inf"), metavar="SECONDS", help=within)
    parser.add_argument("--image-size", type=int, default=64, help="of the flat image that JPEG payloads leave out")
    return parser


def train_seeds(arguments: argparse.Namespace) -> dict[int, Path]:
    """seed -> run folder, all finished."""
    runs = arguments.runs or Path("runs") / arguments.out.name
    folders = {seed: runs / f"seed_{seed}" for seed in arguments.seeds}
    wanted = {}
    for seed, folder in folders.items():
        wanted[folder] = train_arguments(arguments.config, arguments.override, seed, folder)
    train_all(wanted, arguments.jobs)
    return folders


def summarise(curves: Sequence[Sequence[Row]], flat_kb: float, until_seconds: float = float("inf")) -> dict[str, Any]:
    """Start, end and change of everything evaluated (mean and standard error over seeds), and what JPEG sizes hide.

    A JPEG's payload is its kB beyond those of a flat image, `flat_kb`; `relative_change` is end / start - 1 of a seed.
    """
    # What it took.
    ends = [evaluated(rows, eval_metrics(rows)[0], until_seconds)[-1] for rows in curves]
    summary: dict[str, Any] = {
        "seeds": [rows[0]["seed"] for rows in curves],
        "iterations": [row["iteration"] for row in ends],
        "queries": mean_and_error([row["queries"] for row in ends]),
        "seconds": mean_and_error([row["seconds"] for row in ends]),
        "held_out": {},
        "rollouts": _rollouts(curves, until_seconds),
    }

    # What came of it on held-out prompts.
    for metric in eval_metrics(curves[0]):
        pairs = [_first_and_last(rows, metric, until_seconds) for rows in curves]
        summary["held_out"][metric] = start_end_change(pairs)
        if metric in _JPEG_SIGNS:
            sign = _JPEG_SIGNS[metric]
            payloads = [(sign * start - flat_kb, sign * end - flat_kb) for start, end in pairs]
            relative = mean_and_error([end / start - 1 for start, end in payloads])
            summary["payload_kb"] = {**start_end_change(payloads), "relative_change": relative, "flat_kb": flat_kb}
        if metric == _DETECTOR:
            summary["detector_ratio"] = mean_and_error([end / start if start else 0.0 for start, end in pairs])
    return summary


def _first_and_last(rows: Sequence[Row], metric: str, until_seconds: float) -> tuple[float, float]:
    points = evaluated(rows, metric, until_seconds)
    return points[0][metric], points[-1][metric]


def _rollouts(curves: Sequence[Sequence[Row]], until_seconds: float) -> dict[str, Any]:
    """Rewards on training prompts: means of the first and of the last `_WINDOW` iterations."""
    result = {}
    metrics = [key for key in curves[0][0] if key.startswith("reward/")]
    for metric in metrics:
        pairs = []
        for rows in curves:
            values = [row[metric] for row in evaluated(rows, metric, until_seconds)]
            first, last = values[:_WINDOW], values[-_WINDOW:]
            pairs.append((sum(first) / len(first), sum(last) / len(last)))
        result[metric] = start_end_change(pairs)
    return result


def start_end_change(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    return {
        "start": mean_and_error([start for start, _ in pairs]),
        "end": mean_and_error([end for _, end in pairs]),
        "change": mean_and_error([end - start for start, end in pairs]),
    }


def flat_image_kilobytes(size: int, quality: int) -> float:
    """The JPEG of a grey image of size x size pixels: what no picture can go below."""
    import torch

    from rlcm_fast.rewards.jpeg import jpeg_kilobytes

    return round(jpeg_kilobytes(torch.full((1, 3, size, size), 0.5), quality).item(), 6)


def _jpeg_quality(run_dir: Path) -> int:
    """The quality of the run's JPEG reward; its default where the config gives none."""
    import yaml

    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    for reward in [*config["rewards"], *config["evaluation"]["rewards"]]:
        if reward["name"].startswith("jpeg_"):
            return reward["arguments"].get("quality", 95)
    return 95


def plot(curves: Sequence[Sequence[Row]], path: Path, title: str) -> None:
    """A column for each metric of the evaluation, above against seconds, below against queries."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = eval_metrics(curves[0])
    figure, axes = pyplot.subplots(2, len(metrics), figsize=(4 * len(metrics), 6), squeeze=False)
    for row, (x, label) in enumerate((("seconds", "seconds of training"), ("queries", "reward queries"))):
        for column, metric in enumerate(metrics):
            draw_curve(axes[row][column], curves, metric, x)
            axes[row][column].set(xlabel=label, ylabel=metric.removeprefix("eval/").removesuffix("/mean"))
    figure.suptitle(f"{title}: held-out prompts, mean and standard deviation of {len(curves)} seeds")
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
