"""Learning curves of several settings in one picture, and what each has kept when all have come equally far.

    python benchmarks/learning/compare_curves.py --curves benchmarks/results/learning/compressibility.csv \\
        benchmarks/results/learning/compressibility_paper.csv --reach eval/jpeg_compressibility/mean -1.2 \\
        --out benchmarks/results/learning/guards

Reads the CSV files that learning_curves.py wrote, one a setting, named by their files. For each setting and seed it
finds where --reach METRIC first attains VALUE (linear between evaluations, from either side) and what everything else
that was evaluated is there; seeds that never attain it are counted and left out. Writes OUT.csv (a row a setting: mean
and standard error over seeds), OUT.png (each metric against queries) and OUT.json, which is also the last line.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.summaries import shared_metrics
from benchmarks.shared.figures import draw_curve, save_figure
from benchmarks.shared.reporting import mean_and_error, print_summary, write_csv
from benchmarks.shared.training_runs import Row, eval_metrics, evaluated

Curves = Mapping[str, Sequence[Sequence[Row]]]  # setting -> seeds -> rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curves", type=Path, nargs="+", required=True, metavar="CSV", help="of learning_curves.py")
    parser.add_argument("--reach", nargs=2, required=True, metavar=("METRIC", "VALUE"), help="where settings compare")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        curves = {path.stem: read_curves(path) for path in arguments.curves}
        rows = compare(curves, arguments.reach[0], float(arguments.reach[1]))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_csv(arguments.out.with_suffix(".csv"), rows)
    plot(curves, arguments.out.with_suffix(".png"))
    print_summary({"settings": rows}, arguments.out.with_suffix(".json"))
    return 0


def read_curves(path: Path) -> list[list[Row]]:
    """seeds -> rows, as `training_runs.curve` made them."""
    rows: list[Row] = []
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            rows.append({key: float(text) for key, text in line.items() if text})
    if not rows or "queries" not in rows[0]:
        raise ValueError(f"curves={path} has no learning curves; give a CSV that learning_curves.py wrote")
    by_seed: dict[float, list[Row]] = {}
    for row in rows:
        by_seed.setdefault(row["seed"], []).append(row)
    return list(by_seed.values())


def compare(curves: Curves, metric: str, value: float) -> list[dict[str, Any]]:
    """A row a setting: means over the seeds that attain `value` of what stood elsewhere then."""
    rows = []
    for name, seeds in curves.items():
        if metric not in eval_metrics(seeds[0]):
            raise ValueError(f"reach={metric} is not in the curves {name}; give one of {eval_metrics(seeds[0])}")
        places = [where(rows_of_seed, metric, value) for rows_of_seed in seeds]
        found = [place for place in places if place is not None]
        row: dict[str, Any] = {"setting": name, "seeds": len(seeds), "seeds_there": len(found)}
        for key in found[0] if found else ():
            statistics = mean_and_error([place[key] for place in found])
            row |= {key: statistics["mean"], f"{key}/standard_error": statistics["standard_error"]}
        rows.append(row)
    return rows


def where(rows: Sequence[Row], metric: str, value: float) -> dict[str, float] | None:
    """Queries, seconds and everything evaluated at the first crossing of `value`; None where there is none."""
    keys = ("queries", "seconds", *eval_metrics(rows))
    for before, after in itertools.pairwise(evaluated(rows, metric)):
        low, high = sorted((before[metric], after[metric]))
        if low <= value <= high and low < high:
            share = (value - before[metric]) / (after[metric] - before[metric])
            return {key: before[key] + share * (after[key] - before[key]) for key in keys}
    return None


def plot(curves: Curves, path: Path) -> None:
    """A column for each metric that all settings have evaluated, against queries; a line and band a setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = shared_metrics(curves)
    figure, axes = pyplot.subplots(1, len(metrics), figsize=(4.5 * len(metrics), 4), squeeze=False)
    for axis, metric in zip(axes[0], metrics, strict=True):
        for name, seeds in curves.items():
            draw_curve(axis, seeds, metric, "queries", name)
        axis.set(xlabel="reward queries", ylabel=metric.removeprefix("eval/").removesuffix("/mean"))
    axes[0][0].legend(fontsize="small")
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
