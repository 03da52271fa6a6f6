"""What the study says of its curves: numbers over seeds, and the tables that the pages of docs/ quote."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Curves
from benchmarks.learning.learning_curves import start_end_change
from benchmarks.shared.figures import draw_curve, save_figure
from benchmarks.shared.reporting import mean_and_error, write_csv
from benchmarks.shared.training_runs import Row, eval_metrics, evaluated

AXES = {"queries": "reward queries", "seconds": "seconds of training", "forwards": "network forwards"}
Statistics = Mapping[str, float | None]  # mean, standard_error


def write_curves(curves: Curves, out: Path, title: str) -> None:
    """OUT.csv, a row an arm, seed and iteration; OUT.png, each metric against queries, seconds and forwards."""
    lines = []
    for arm, seeds in curves.items():
        for rows in seeds:
            lines += [{"arm": arm, **row} for row in rows]
    write_csv(out.with_suffix(".csv"), lines)
    plot(curves, out.with_suffix(".png"), title)


def plot(curves: Curves, path: Path, title: str) -> None:
    """A column for each metric that all arms have evaluated, a row for each axis; a line and band an arm."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    metrics = shared_metrics(curves)
    figure, axes = pyplot.subplots(len(AXES), len(metrics), figsize=(4 * len(metrics), 9), squeeze=False)
    for row, (x, label) in enumerate(AXES.items()):
        for column, metric in enumerate(metrics):
            for arm, seeds in curves.items():
                draw_curve(axes[row][column], seeds, metric, x, arm)
            axes[row][column].set(xlabel=label, ylabel=short_name(metric))
    axes[0][0].legend(fontsize="small")
    num_seeds = len(next(iter(curves.values())))
    figure.suptitle(f"{title}: evaluations, mean and standard deviation of {num_seeds} seeds")
    save_figure(figure, path)


def plot_bars(values: Mapping[str, Mapping[str, Sequence[float]]], path: Path, xlabel: str) -> None:
    """values: panel -> bar -> those of its seeds, whose mean and standard error are drawn."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(values), figsize=(4 * len(values), 3.5), squeeze=False)
    for axis, (panel, bars) in zip(axes[0], values.items(), strict=True):
        # A bar for each group of seeds.
        means, errors = [], []
        for of_seeds in bars.values():
            found = mean_and_error(of_seeds)
            means.append(found["mean"])
            errors.append(found["standard_error"] or 0.0)
        axis.barh(list(bars), means, xerr=errors, alpha=0.7, capsize=3)
        # Lines, names and numbers around them.
        axis.axvline(0.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set(title=panel, xlabel=xlabel)
        axis.locator_params(axis="x", nbins=5)
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def shared_metrics(curves: Curves) -> list[str]:
    """The evaluated metrics that every arm has."""
    of_arms = [eval_metrics(seeds[0]) for seeds in curves.values()]
    shared = set.intersection(*map(set, of_arms))
    return [metric for metric in of_arms[0] if metric in shared]


def short_name(metric: str) -> str:
    """eval/NAME/mean -> NAME, of a reward named as module:Class its class."""
    return metric.removeprefix("eval/").removesuffix("/mean").rpartition(":")[2]


def summarise(curves: Curves) -> dict[str, Any]:
    """What each arm took, and start, end and change of every metric: mean and standard error over seeds."""
    return {arm: _of_arm(seeds) for arm, seeds in curves.items()}


def _of_arm(seeds: Sequence[Sequence[Row]]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_seeds": len(seeds)}
    for x in AXES:
        found[x] = mean_and_error([rows[-1][x] for rows in seeds])
    found["held_out"] = {}
    for metric in eval_metrics(seeds[0]):
        pairs = [(first(rows, metric), final(rows, metric)) for rows in seeds]
        found["held_out"][metric] = start_end_change(pairs)
    return found


def first(rows: Sequence[Row], metric: str) -> float:
    """The metric at the first evaluation."""
    return evaluated(rows, metric)[0][metric]


def final(rows: Sequence[Row], metric: str) -> float:
    """The metric at the last evaluation."""
    return evaluated(rows, metric)[-1][metric]


def change(rows: Sequence[Row], metric: str) -> float:
    """Last minus first evaluation."""
    return final(rows, metric) - first(rows, metric)


def ahead_of(curves: Curves, base: str, metric: str) -> dict[str, Statistics]:
    """How much further than the arm `base` each other arm's metric has come, paired by seed."""
    result = {}
    for arm, seeds in curves.items():
        if arm != base:
            pairs = zip(seeds, curves[base], strict=True)
            result[arm] = mean_and_error([change(rows, metric) - change(of_base, metric) for rows, of_base in pairs])
    return result


def over_seeds(seeds: Sequence[Mapping[str, float]]) -> dict[str, Statistics]:
    """Mean and standard error of each number that the seeds have."""
    result = {}
    for key in seeds[0]:
        result[key] = mean_and_error([found[key] for found in seeds])
    return result


def reaches(rows: Sequence[Row], metric: str, value: float, x: str) -> float | None:
    """Where on `x` a rising `metric` first attains `value`, linear between evaluations; None where it does not."""
    points = [(row[x], row[metric]) for row in evaluated(rows, metric)]
    if points[0][1] >= value:
        return float(points[0][0])
    for (x_0, y_0), (x_1, y_1) in itertools.pairwise(points):
        if y_0 < value <= y_1:
            return x_0 + (x_1 - x_0) * (value - y_0) / (y_1 - y_0)
    return None


def pass_factor(fast: Sequence[Sequence[Row]], slow: Sequence[Sequence[Row]], metric: str, x: str) -> dict[str, Any]:
    """How many times less `x` the fast arm took to attain the slow arm's final `metric`, seed by seed.

    factor = where the slow arm first attains what it ends with / where the fast arm does. Seeds without a factor are
    counted: those where the fast arm never does, where it does from the start, as it had nothing to learn for it, and
    where the slow arm does, which has ended no higher than it began.
    """
    # A factor a seed, or the reason why there is none.
    factors: list[float] = []
    counts = {"never": 0, "from_the_start": 0, "slow_has_not_risen": 0}
    for quick, long in zip(fast, slow, strict=True):
        end = final(long, metric)
        place, slow_place = reaches(quick, metric, end, x), reaches(long, metric, end, x)
        if not slow_place:
            counts["slow_has_not_risen"] += 1
        elif place is None:
            counts["never"] += 1
        elif place == 0:
            counts["from_the_start"] += 1
        else:
            factors.append(slow_place / place)

    # Mean and error of the seeds that have one.
    found = mean_and_error(factors) if factors else {"mean": None, "standard_error": None}
    return {**found, "seeds_that_pass": len(factors), **counts}


def gains(seeds: Sequence[Sequence[Row]], metric: str) -> list[list[Row]]:
    """The evaluations of `metric`, less the first of each seed."""
    result = []
    for rows in seeds:
        start = first(rows, metric)
        result.append([{**row, metric: row[metric] - start} for row in evaluated(rows, metric)])
    return result


def share(parts: Sequence[float], wholes: Sequence[float]) -> dict[str, float | None]:
    """The mean of parts over the mean of wholes, and its standard error to first order, the two paired by seed.

    For gains: what a joint model keeps of a specialist's, what held-out prompts gain of what training prompts gain.
    """
    part, whole = sum(parts) / len(parts), sum(wholes) / len(wholes)
    if whole == 0:
        return {"mean": None, "standard_error": None}
    ratio = part / whole
    residuals = [(p - ratio * w) / whole for p, w in zip(parts, wholes, strict=True)]
    return {"mean": ratio, "standard_error": mean_and_error(residuals)["standard_error"]}


def table(curves: Curves, metrics: Sequence[str]) -> str:
    """Markdown: an arm a line, what it took, and for each metric where it started and ended."""
    head = ["arm", *AXES]
    for metric in metrics:
        head += [f"{short_name(metric)}, start", "end"]
    lines = []
    for arm, found in summarise(curves).items():
        cells = [arm]
        for x in AXES:
            cells.append(f"{found[x]['mean']:,.0f}")
        for metric in metrics:
            held_out = found["held_out"][metric]
            cells += [shown(held_out["start"]), shown(held_out["end"])]
        lines.append(cells)
    return markdown(head, lines)


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table with these cells."""
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def named(name: str, found: Mapping[str, Statistics], digits: int = 3) -> list[str]:
    """The cells of a line: a name, and each of its numbers as `shown` writes it."""
    return [name, *(shown(one, digits) for one in found.values())]


def shown(statistics: Statistics, digits: int = 3) -> str:
    """Writes mean and standard error, e.g. "0.123 +- 0.004"; "-" if there is no mean."""
    mean, error = statistics["mean"], statistics["standard_error"]
    if mean is None:
        return "-"
    return f"{mean:.{digits}f}" + (f" +- {error:.{digits}f}" if error else "")
