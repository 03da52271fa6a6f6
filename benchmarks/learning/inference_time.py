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
from benchmarks.learning.exports import scores_by_arm, start_score
from benchmarks.learning.rlcm_against_ddpo import trained_arms
from benchmarks.learning.summaries import markdown, shown
from benchmarks.shared.figures import save_figure
from benchmarks.shared.reporting import mean_and_error, write_csv

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
    settings = {name: found for name, found in _SETTINGS.items() if name not in arguments.without}
    chosen, runs = trained_arms("compressibility", arguments, list(settings))
    rows: list[dict[str, Any]] = []
    for start, steps, forwards in dict.fromkeys(settings.values()):
        arms = [chosen[name] for name, setting in settings.items() if setting[0] == start]
        for count in steps:
            asked = ("shapes:one:held_out", _MEASURED, count, _NUM_IMAGES)
            found = {start: [start_score(start, runs, *asked)], **scores_by_arm(arms, runs, *asked)}
            for model, scores in found.items():
                head = {"model": model, "num_steps": count, "forwards": count * forwards}
                rows.append({**head, **{key: mean_and_error([score[key] for score in scores]) for key in scores[0]}})
    write_csv(arguments.out.with_suffix(".csv"), [_flat(row) for row in rows])
    plot(rows, arguments)
    keys = ("seconds_per_image", *_MEASURED)
    lines = [[str(row[k]) for k in ("model", "num_steps", "forwards")] + [shown(row[k]) for k in keys] for row in rows]
    print(markdown([["model", "steps", "forwards", *keys], ["---"] * 6, *lines]))
    return {"rows": rows, "num_images": _NUM_IMAGES}


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
    for axis, metric in zip(axes, _MEASURED, strict=True):
        for model in dict.fromkeys(row["model"] for row in rows):
            own = [row for row in rows if row["model"] == model]
            xs, ys = [row["seconds_per_image"]["mean"] for row in own], [row[metric] for row in own]
            errors = [y["standard_error"] or 0.0 for y in ys]
            axis.errorbar(xs, [y["mean"] for y in ys], errors, marker=".", label=model)
            for x, y, row in zip(xs, ys, own, strict=True):
                axis.annotate(row["num_steps"], (x, y["mean"]), (4, 4), textcoords="offset points", fontsize="x-small")
        axis.set(xlabel="seconds an image", ylabel=metric, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    save_figure(figure, arguments.out.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(run_figure("inference_time", __doc__, draw, add_without))
