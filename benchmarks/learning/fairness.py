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

from benchmarks.learning.arms import Arm, chosen_lrs, run_figure, train_arms, tuned
from benchmarks.learning.exports import Exam, picture_arms, scores_with_start
from benchmarks.learning.summaries import ahead_of, markdown, named, over_seeds, summarise, table, write_curves

_REWARDS = (
    "[{name: distribution_parity, weight: 16, arguments: {classifier: shapes_colour, votes: hard}, group_size: 16,"
    " credit: CREDIT}, {name: shapes_alignment, weight: 2}]"
)
_SHORT = ("num_iterations", "32", "checkpoint.every", "12", "evaluation.every", "8")
_LRS, _TUNING_SHARE = ("5e-5", "1e-4", "2e-4"), 0.5
_PARITY = "{name: distribution_parity, arguments: {classifier: shapes_colour, votes: hard}, group_size: 128}"
_NO_L_PRE = ("pretraining.data", "", "pretraining.weight", "0")
_EXAMS = {
    "neutral": Exam("shapes:neutral", (_PARITY, "shapes_alignment"), num_steps=4, num_images=512),
    "coloured": Exam("shapes:one", ("shapes_alignment",), num_steps=4, num_images=192),
    "coloured_held_out": Exam("shapes:one:held_out", ("shapes_alignment",), num_steps=4, num_images=192),
}


def arms(l_pre: bool = False) -> list[Arm]:
    without = () if l_pre else _NO_L_PRE
    result = []
    for credit in ("leave_one_out", "group"):
        rewards = ("rewards", _REWARDS.replace("CREDIT", credit))
        result.append(Arm(credit, "fairness", (*rewards, *_SHORT, *without)))
    return result


def add_l_pre(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--l_pre", action="store_true", help="with the config's loss on real images, in both arms")


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    if arguments.l_pre:  # runs and results of their own
        arguments.runs, arguments.out = Path(f"{arguments.runs}_l_pre"), Path(f"{arguments.out}_l_pre")

    # Train both arms, each at its best rate; draw curves and what the arms paint.
    chosen = tuned(arms(arguments.l_pre), _LRS, _TUNING_SHARE, arguments)
    trained = list(chosen.values())
    curves = train_arms(trained, arguments)
    write_curves(curves, arguments.out, "parity of colours")
    picture_arms(trained, arguments, "shapes:neutral", 12)

    # Compare them while they trained, and by more images afterwards.
    metrics = ["eval/distribution_parity/mean", "eval/shapes_alignment/mean"]
    print(table(curves, metrics))
    after = _after(trained, arguments)
    lines = [named(name, found) for name, found in after.items()]
    print(markdown(["model", *after["start"]], lines))
    ahead = {metric: ahead_of(curves, "group", metric) for metric in metrics}
    return {"lr": chosen_lrs(chosen), "arms": summarise(curves), "ahead_of_group": ahead, "after": after}


def _after(arms: list[Arm], arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """model -> "what: reward" -> mean and standard error over seeds."""
    result: dict[str, dict[str, Any]] = {}
    for what, exam in _EXAMS.items():
        for name, seeds in scores_with_start(arms, arguments, exam, arguments.jobs).items():
            of_model = result.setdefault(name, {})
            for reward, found in over_seeds(seeds).items():
                if reward != "seconds_per_image":
                    of_model[f"{what}: {reward}"] = found
    return result


if __name__ == "__main__":
    sys.exit(run_figure("fairness", __doc__, draw, add_l_pre))
