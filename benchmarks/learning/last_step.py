"""Is the paper's last action worth its compute? policy.last_step deterministic against renoise, on the same seeds.

    python benchmarks/learning/last_step.py --config configs/shapes/compressibility.yaml --seeds 0 1 2 \\
        --out benchmarks/results/learning/last_step

With S steps, renoise trains S actions, of which the last noises an image that is thrown away; deterministic trains
S - 1. Compared is the gain of a held-out reward over its start, at equal queries (all of them) and at equal training
time (that of the shortest run), seed by seed. Writes OUT.csv, OUT.png and OUT.json, which is also the last line.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.figures import draw_curve, save_figure
from benchmarks.shared.reporting import mean_and_error, print_summary, write_csv
from benchmarks.shared.training_runs import (
    Row,
    add_run_arguments,
    at,
    curve,
    eval_metrics,
    evaluated,
    train_all,
    train_arguments,
)

VARIANTS = ("deterministic", "renoise")
Curves = Mapping[str, Sequence[Sequence[Row]]]  # variant -> seeds -> rows


def main() -> int:
    arguments = _parser().parse_args()
    try:
        curves = _train_variants(arguments)
        metric = _metric(curves, arguments.metric)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = []
    for name, seeds in curves.items():
        for rows in seeds:
            lines += [{"variant": name, **row} for row in rows]
    write_csv(arguments.out.with_suffix(".csv"), lines)
    plot(curves, metric, arguments.out.with_suffix(".png"))
    print_summary(summarise(curves, metric), arguments.out.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning/last_step"))
    metric = "key of metrics.jsonl that is compared (default: the first evaluated of reward/*)"
    parser.add_argument("--metric", help=metric)
    return parser


def _train_variants(arguments: argparse.Namespace) -> dict[str, list[list[Row]]]:
    """variant -> the curves of all seeds."""
    runs = arguments.runs or Path("runs") / arguments.out.name
    wanted = {}
    for seed in arguments.seeds:
        for variant in VARIANTS:
            folder = runs / variant / f"seed_{seed}"
            overrides = [*arguments.override, "policy.last_step", variant]
            wanted[folder] = train_arguments(arguments.config, overrides, seed, folder)
    train_all(wanted, arguments.jobs)
    curves = {}
    for variant in VARIANTS:
        curves[variant] = [curve(runs / variant / f"seed_{seed}", seed) for seed in arguments.seeds]
    return curves


def _metric(curves: Curves, wish: str | None) -> str:
    """The metric to compare: `wish`, or the first trained reward that was evaluated, or the first evaluated metric."""
    rows = curves[VARIANTS[0]][0]
    known = eval_metrics(rows)
    rewards = [key.split("/")[1] for key in rows[0] if key.startswith("reward/")]
    candidates = [f"eval/{name}/mean" for name in rewards if f"eval/{name}/mean" in known]
    metric = wish or [*candidates, *known, ""][0]
    if metric not in known:
        raise ValueError(
            f"metric={metric} was not evaluated; give one of {', '.join(known) or 'none: evaluation is off'}"
        )
    return metric


def summarise(curves: Curves, metric: str) -> dict[str, Any]:
    """Gains at equal queries and at equal seconds, and how much deterministic is ahead (paired by seed)."""
    seconds = {}
    for name, seeds in curves.items():
        seconds[name] = mean_and_error([rows[-1]["seconds"] / max(1, rows[-1]["iteration"]) for rows in seeds])
    summary: dict[str, Any] = {
        "metric": metric,
        "num_seeds": len(curves[VARIANTS[0]]),
        "seconds_per_iteration": seconds,
    }
    for x in _AXES:
        end = _shared_end(curves, metric, x)
        summary[f"at_equal_{x}"] = {x: end, **_compared(curves, metric, x, end)}
    return summary


def _shared_end(curves: Curves, metric: str, x: str) -> float:
    """How far on `x` every run has come."""
    runs = itertools.chain(*curves.values())
    return min(evaluated(rows, metric)[-1][x] for rows in runs)


_AXES = ("queries", "seconds")


def _compared(curves: Curves, metric: str, x: str, place: float) -> dict[str, Any]:
    """Both variants' gains where `x` is `place`."""
    gains = {}
    for name, seeds in curves.items():
        gains[name] = [_gain(rows, metric, x, place) for rows in seeds]
    first, second = (gains[name] for name in VARIANTS)
    first_mean, second_mean = sum(first) / len(first), sum(second) / len(second)
    return {
        "gain": {name: mean_and_error(values) for name, values in gains.items()},
        "deterministic_ahead_by": mean_and_error([a - b for a, b in zip(first, second, strict=True)]),
        "ratio_of_mean_gains": first_mean / second_mean if second_mean else None,
    }


def _gain(rows: Sequence[Row], metric: str, x: str, place: float) -> float:
    return at(rows, metric, x, place) - evaluated(rows, metric)[0][metric]


def plot(curves: Curves, metric: str, path: Path) -> None:
    """The metric against queries (left) and seconds (right), a line and band for each variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    for axis, x, label in zip(axes, _AXES, ("reward queries", "seconds of training"), strict=True):
        for name, seeds in curves.items():
            draw_curve(axis, seeds, metric, x, f"last_step: {name}")
        axis.set(xlabel=label, ylabel=metric)
        axis.legend()
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
