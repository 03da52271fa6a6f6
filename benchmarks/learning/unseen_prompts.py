"""Unseen prompts: the gain on held-out combinations as a share of the gain on training ones.

    python benchmarks/learning/unseen_prompts.py --jobs 2

Scores the RLCM arms of rlcm_against_ddpo.py, which it trains where that has not: 512 images of training and as many of
held-out captions, from each seed's model and from the start model.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from arms import Arm, run_figure
from exports import scores_by_arm, start_score
from reporting import mean_and_error, write_csv
from rlcm_against_ddpo import REWARDS, trained_arms
from summaries import markdown, plot_bars, share, shown

_NUM_IMAGES = 512
MEASURED = {  # task -> prompts, what was trained
    "compressibility": ("shapes:one", "jpeg_compressibility"),
    "incompressibility": ("shapes:one", "jpeg_incompressibility"),
    "alignment": ("shapes:two", "shapes_alignment"),
}


def add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tasks", nargs="+", default=REWARDS, choices=REWARDS, help="default: all three")


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    rows, summary, by_task = [], {}, {}
    for task in arguments.tasks:
        chosen, runs = trained_arms(task, arguments, ["rlcm"])
        gains = {split: _gains(task, split, chosen["rlcm"], runs) for split in ("training", "held_out")}
        for split, values in gains.items():
            rows += [
                {"task": task, "split": split, "seed": s, "gain": g}
                for s, g in zip(arguments.seeds, values, strict=True)
            ]
        by_task[task] = gains
        means = {split: mean_and_error(values) for split, values in gains.items()}
        summary[task] = {**means, "generalisation": share(gains["held_out"], gains["training"])}
    write_csv(arguments.out.with_suffix(".csv"), rows)
    plot_bars(by_task, arguments.out.with_suffix(".png"), "gain over the start model")
    lines = [[task, *(shown(value) for value in found.values())] for task, found in summary.items()]
    head = ["task", "gain on training captions", "on held-out captions", "share"]
    print(markdown([head, ["---"] * 4, *lines]))
    return {"tasks": summary, "num_images": _NUM_IMAGES}


def _gains(task: str, split: str, arm: Arm, runs: argparse.Namespace) -> list[float]:
    """Of each seed over the start model."""
    source, reward = MEASURED[task]
    measured = (source + (":held_out" if split == "held_out" else ""), [reward], 4, _NUM_IMAGES)
    start = start_score("shapes/lcm", runs, *measured)[reward]
    return [found[reward] - start for found in scores_by_arm([arm], runs, *measured)[arm.name]]


if __name__ == "__main__":
    sys.exit(run_figure("unseen_prompts", __doc__, draw, add_tasks))
