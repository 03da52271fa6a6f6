"""Is the paper's last action worth its compute? policy.last_step deterministic against renoise, on the same seeds.

    python benchmarks/learning/last_step.py --config configs/shapes/compressibility.yaml --seeds 0 1 2 \\
        --out benchmarks/results/learning/last_step

With S steps, renoise trains S actions, of which the last noises an image that is thrown away; deterministic trains
S - 1. Compared is the gain of a held-out reward over its start, at equal queries (all of them) and at equal training
time (that of the shortest run), seed by seed. Writes OUT.csv, OUT.png and OUT.json, which is also the last line.
"""

from __future__ import annotations

import argparse
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/learning/last_step"))
    metric = "key of metrics.jsonl that is compared (default: the first evaluated of reward/*)"
    parser.add_argument("--metric", help=metric)
    arguments = parser.parse_args()
    try:
        curves = _train_variants(arguments)
        metric = _metric(curves, arguments.metric)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows = [{"variant": name, **row} for name, seeds in curves.items() for seed in seeds for row in seed]
    write_csv(arguments.out.with_suffix(".csv"), rows)
    plot(curves, metric, arguments.out.with_suffix(".png"))
    print_summary(summarise(curves, metric), arguments.out.with_suffix(".json"))
    return 0


def _train_variants(arguments: argparse.Namespace) -> dict[str, list[list[Row]]]:
    """variant -> the curves of all seeds."""
    runs = arguments.runs or Path("runs") / arguments.out.name
    folders = {(seed, variant): runs / variant / f"seed_{seed}" for seed in arguments.seeds for variant in VARIANTS}
    wanted = {}
    for (seed, variant), folder in folders.items():
        overrides = [*arguments.override, "policy.last_step", variant]
        wanted[folder] = train_arguments(arguments.config, overrides, seed, folder)
    train_all(wanted, arguments.jobs)
    return {variant: [curve(folders[seed, variant], seed) for seed in arguments.seeds] for variant in VARIANTS}


def _metric(curves: Curves, wish: str | None) -> str:
    rows = curves[VARIANTS[0]][0]
    trained = [f"eval/{key.split('/')[1]}/mean" for key in rows[0] if key.startswith("reward/")]
    known = eval_metrics(rows)
    metric = wish or next((key for key in trained if key in known), known[0] if known else "")
    if metric not in known:
        raise ValueError(
            f"metric={metric} was not evaluated; give one of {', '.join(known) or 'none: evaluation is off'}"
        )
    return metric


def summarise(curves: Curves, metric: str) -> dict[str, Any]:
    """Gains at equal queries and at equal seconds, and how much deterministic is ahead (paired by seed)."""
    ends = {x: min(evaluated(rows, metric)[-1][x] for seeds in curves.values() for rows in seeds) for x in _AXES}
    seconds = {
        name: mean_and_error([rows[-1]["seconds"] / max(1, rows[-1]["iteration"]) for rows in seeds])
        for name, seeds in curves.items()
    }
    return {
        "metric": metric,
        "num_seeds": len(curves[VARIANTS[0]]),
        "seconds_per_iteration": seconds,
        **{f"at_equal_{x}": {x: ends[x], **_compared(curves, metric, x, ends[x])} for x in _AXES},
    }


_AXES = ("queries", "seconds")


def _compared(curves: Curves, metric: str, x: str, place: float) -> dict[str, Any]:
    gains = {
        name: [at(rows, metric, x, place) - evaluated(rows, metric)[0][metric] for rows in seeds]
        for name, seeds in curves.items()
    }
    first, second = (gains[name] for name in VARIANTS)
    means = [sum(values) / len(values) for values in (first, second)]
    return {
        "gain": {name: mean_and_error(values) for name, values in gains.items()},
        "deterministic_ahead_by": mean_and_error([a - b for a, b in zip(first, second, strict=True)]),
        "ratio_of_mean_gains": means[0] / means[1] if means[1] else None,
    }


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
