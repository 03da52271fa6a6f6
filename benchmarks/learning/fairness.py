"""Fairness: the colours of neutral captions before and after, by credit to each image or to its group.

    python benchmarks/learning/fairness.py --jobs 2
    python benchmarks/learning/fairness.py --l_pre --jobs 2

The start model paints a caption without a colour in one colour about 70 % of the time. Both arms optimise
`distribution_parity` of 16 images of a caption with the detector's score beside it; `leave_one_out` gives an image what
it adds to its group's value, `group` all of the value, as arXiv 2401.12244 has it. With --l_pre both arms keep the
config's loss on real images, which that paper's runs have, too: renders of captions with a colour, which say nothing of
what neutral ones should show. Learning rates by a sweep of short runs. After training 128 images of each caption are
drawn from each model: their parity, all 128 taken together; the detector's score on neutral captions; and on captions
with a colour, of training and held out: what should not suffer. Last, what seed 0 of each paints of neutral captions.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, run_figure, run_folder, train_arms, tuned
from benchmarks.learning.exports import save_pictures, scores_by_arm, start_score
from benchmarks.learning.summaries import ahead_of, markdown, shown, summarise, table, write_curves
from benchmarks.shared.reporting import mean_and_error

_REWARDS = (
    "[{name: distribution_parity, weight: 16, arguments: {classifier: shapes_colour, votes: hard}, group_size: 16,"
    " credit: CREDIT}, {name: shapes_alignment, weight: 2}]"
)
_SHORT = ("num_iterations", "32", "checkpoint.every", "12", "evaluation.every", "8")
_LRS, _TUNING_SHARE = ("5e-5", "1e-4", "2e-4"), 0.5
_PARITY = "{name: distribution_parity, arguments: {classifier: shapes_colour, votes: hard}, group_size: 128}"
_NO_L_PRE = ("pretraining.data", "", "pretraining.weight", "0")
_MEASURED = {  # what -> prompts, rewards, images
    "neutral": ("shapes:neutral", (_PARITY, "shapes_alignment"), 512),
    "coloured": ("shapes:one", ("shapes_alignment",), 192),
    "coloured_held_out": ("shapes:one:held_out", ("shapes_alignment",), 192),
}


def arms(l_pre: bool = False) -> list[Arm]:
    without = () if l_pre else _NO_L_PRE
    return [
        Arm(credit, "fairness", ("rewards", _REWARDS.replace("CREDIT", credit), *_SHORT, *without))
        for credit in ("leave_one_out", "group")
    ]


def add_l_pre(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--l_pre", action="store_true", help="with the config's loss on real images, in both arms")


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.l_pre:  # runs and results of their own
        arguments.runs, arguments.out = Path(f"{arguments.runs}_l_pre"), Path(f"{arguments.out}_l_pre")
    chosen = tuned(arms(arguments.l_pre), _LRS, _TUNING_SHARE, arguments)
    curves = train_arms(list(chosen.values()), arguments)
    write_curves(curves, arguments.out, "parity of colours")
    metrics = ["eval/distribution_parity/mean", "eval/shapes_alignment/mean"]
    print(table(curves, metrics))
    models = {name: str(run_folder(arguments.runs, arm, arguments.seeds[0]) / "export") for name, arm in chosen.items()}
    pictures = arguments.out.with_name(f"{arguments.out.name}_pictures.png")
    save_pictures({"start": "shapes/lcm", **models}, "shapes:neutral", 12, pictures)
    after = _after(list(chosen.values()), arguments)
    print(markdown([["model", *after["start"]], ["---"] * (1 + len(after["start"])), *_lines(after)]))
    lrs = {name: arm.overrides[-1] for name, arm in chosen.items()}
    ahead = {metric: ahead_of(curves, "group", metric) for metric in metrics}
    return {"lr": lrs, "arms": summarise(curves), "ahead_of_group": ahead, "after": after}


def _after(arms: list[Arm], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """model -> "what: reward" -> mean and standard error over seeds."""
    result: dict[str, dict[str, Any]] = {name: {} for name in ("start", *(arm.name for arm in arms))}
    for what, (source, rewards, num_images) in _MEASURED.items():
        by_arm = scores_by_arm(arms, arguments, source, rewards, 4, num_images, arguments.jobs)
        by_arm = {"start": [start_score("shapes/lcm", arguments, source, rewards, 4, num_images)], **by_arm}
        for name, seeds in by_arm.items():
            for reward in (key for key in seeds[0] if key != "seconds_per_image"):
                result[name][f"{what}: {reward}"] = mean_and_error([found[reward] for found in seeds])
    return result


def _lines(after: dict[str, dict[str, Any]]) -> list[list[str]]:
    return [[name, *(shown(statistics) for statistics in found.values())] for name, found in after.items()]


if __name__ == "__main__":
    sys.exit(run_figure("fairness", __doc__, draw, add_l_pre))
