"""Reward against inference time: tuned models at 1 to 8 steps (RLCM, trained at 4) and at 10 to 50 (DDPO, at 10 or 50).

    python benchmarks/learning/inference_time.py --jobs 2

Scores the arms of `rlcm_against_ddpo.py compressibility`, which it trains where that has not, and their start models:
128 images of held-out captions for each seed and number of steps, by stock pipelines, so DDIM adds no noise here.
Seconds are of an image in batches of 64 on one thread; forwards are rows through the network, two a step with guidance.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.learning.arms import run_figure
from benchmarks.learning.exports import Exam, scores_by_arm, start_score
from benchmarks.learning.rlcm_against_ddpo import trained_arms
from benchmarks.learning.summaries import markdown, over_seeds, shown
from benchmarks.shared.figures import save_figure
from benchmarks.shared.reporting import write_csv

_NUM_IMAGES = 128
_REWARD = "jpeg_compressibility"
_MEASURED = (_REWARD, "shapes_alignment")
_SETTINGS = {  # arm -> its start model, steps, forwards of a step
    "rlcm": ("shapes/lcm", (1, 2, 4, 8), 1),
    "ddpo_10": ("shapes/teacher", (10, 20, 30, 50), 2),
    "ddpo_50": ("shapes/teacher", (10, 20, 30, 50), 2),
}


def add_without(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--without", nargs="+", default=[], choices=_SETTINGS, help="arms to leave out")


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    # Score each start model, and the arms that were tuned from it, at each number of steps.
    settings = {name: found for name, found in _SETTINGS.items() if name not in arguments.without}
    chosen, runs = trained_arms("compressibility", arguments, list(settings))
    rows: list[dict[str, Any]] = []
    for start, steps, forwards in dict.fromkeys(settings.values()):
        arms = [chosen[name] for name, setting in settings.items() if setting[0] == start]
        for count in steps:
            exam = Exam("shapes:one:held_out", _MEASURED, count, _NUM_IMAGES)
            found = {start: [start_score(start, runs, exam)], **scores_by_arm(arms, runs, exam)}
            for model, scores in found.items():
                head = {"model": model, "num_steps": count, "forwards": count * forwards}
                rows.append({**head, **over_seeds(scores)})

    # Write and print them.
    write_csv(arguments.out.with_suffix(".csv"), [_flat(row) for row in rows])
    plot(rows, arguments)
    print(_table(rows))
    return {"rows": rows, "num_images": _NUM_IMAGES}


def _table(rows: list[dict[str, Any]]) -> str:
    keys = ("seconds_per_image", *_MEASURED)
    lines = []
    for row in rows:
        head = [row["model"], str(row["num_steps"]), str(row["forwards"])]
        lines.append([*head, *(shown(row[key]) for key in keys)])
    return markdown(["model", "steps", "forwards", *keys], lines)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if isinstance(value, dict):
            flat |= {key: value["mean"], f"{key}/standard_error": value["standard_error"]}
        else:
            flat[key] = value
    return flat


def plot(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Each reward against seconds an image, a line for each model, a number of steps at each point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = pyplot.subplots(1, len(_MEASURED), figsize=(10, 4))
    models = dict.fromkeys(row["model"] for row in rows)
    for axis, metric in zip(axes, _MEASURED, strict=True):
        # Draw a line for each model.
        for model in models:
            _draw_line(axis, [row for row in rows if row["model"] == model], metric)
        # Name the axes; seconds are on a logarithmic one.
        axis.set(xlabel="seconds an image", ylabel=metric, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save_figure(figure, arguments.out.with_suffix(".png"))


def _draw_line(axis: Any, rows: list[dict[str, Any]], metric: str) -> None:
    """One model's line: a point and a label for each number of steps."""
    xs = [row["seconds_per_image"]["mean"] for row in rows]
    ys = [row[metric]["mean"] for row in rows]
    errors = [row[metric]["standard_error"] or 0.0 for row in rows]
    axis.errorbar(xs, ys, errors, marker=".", label=rows[0]["model"])
    for x, y, row in zip(xs, ys, rows, strict=True):
        axis.annotate(row["num_steps"], (x, y), (4, 4), textcoords="offset points", fontsize="x-small")


if __name__ == "__main__":
    sys.exit(run_figure("inference_time", __doc__, draw, add_without))
