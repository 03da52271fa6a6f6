"""Unseen prompts: the gain on held-out combinations as a share of the gain on training ones.

    python benchmarks/learning/unseen_prompts.py compressibility --jobs 2

and the same with incompressibility and alignment. Scores the RLCM arm of rlcm_against_ddpo.py, which it trains where
that has not: 512 images of training and as many of held-out captions, from each seed's model and from the start model.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, run_figure
from benchmarks.learning.exports import START, Exam, scores_by_arm, start_score
from benchmarks.learning.rlcm_against_ddpo import add_reward, trained_arms
from benchmarks.learning.summaries import markdown, plot_bars, share, shown
from benchmarks.shared.reporting import mean_and_error, write_csv

_NUM_IMAGES = 512
MEASURED = {  # reward -> prompts, what is measured
    "compressibility": ("shapes:one", "jpeg_compressibility"),
    "incompressibility": ("shapes:one", "jpeg_incompressibility"),
    "alignment": ("shapes:two", "shapes_alignment"),
}


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    reward = arguments.reward
    chosen, runs = trained_arms(reward, arguments, ["rlcm"])
    arguments.out = Path(f"{arguments.out}_{reward}")
    gains = {split: _gains(reward, split, chosen["rlcm"], runs) for split in ("training", "held_out")}
    rows = []
    for split, values in gains.items():
        for seed, gain in zip(arguments.seeds, values, strict=True):
            rows.append({"split": split, "seed": seed, "gain": gain})
    write_csv(arguments.out.with_suffix(".csv"), rows)
    plot_bars({reward: gains}, arguments.out.with_suffix(".png"), "gain over the start model")
    means = {split: mean_and_error(values) for split, values in gains.items()}
    found = {**means, "generalisation": share(gains["held_out"], gains["training"])}
    head = ["gain on training captions", "on held-out captions", "share"]
    print(markdown(head, [[shown(value) for value in found.values()]]))
    return {"reward": reward, **found, "num_images": _NUM_IMAGES}


def _gains(reward: str, split: str, arm: Arm, runs: argparse.Namespace) -> list[float]:
    """The gain of each seed over the start model."""
    source, metric = MEASURED[reward]
    if split == "held_out":
        source += ":held_out"
    exam = Exam(source, [metric], num_steps=4, num_images=_NUM_IMAGES)
    start = start_score(START, runs, exam)[metric]
    of_seeds = scores_by_arm([arm], runs, exam, runs.jobs)[arm.name]
    return [found[metric] - start for found in of_seeds]


if __name__ == "__main__":
    sys.exit(run_figure("unseen_prompts", __doc__, draw, add_reward))
