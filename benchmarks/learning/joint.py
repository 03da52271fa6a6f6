"""Joint training against specialists: the share of each specialist's gain that one model of all three tasks keeps.

    python benchmarks/learning/joint.py --jobs 2

The joint arm is configs/shapes/joint.yaml, 64 images a task and iteration; a specialist has one of its tasks alone,
with as many images of it and as many iterations, so each task has had equal queries; all at one learning rate.
Afterwards every model is scored on every task: the detector on held-out captions of two shapes, parity of 256 images of
each neutral caption, and minus the kB of held-out captions of one shape. kept = the joint model's gain over the start
model / the specialist's.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import yaml
from arms import Arm, run_figure, train_arms
from exports import scores_by_arm, start_score
from reporting import ROOT, mean_and_error, write_csv
from summaries import markdown, share, shown

_SHORT = ("num_iterations", "40", "checkpoint.every", "10", "evaluation.every", "0")
_PARITY = "{name: distribution_parity, arguments: {classifier: shapes_colour, votes: hard}, group_size: 256}"
MEASURED = {  # task -> prompts, reward as asked for and as answered, images
    "alignment": ("shapes:two:held_out", "shapes_alignment", "shapes_alignment", 512),
    "parity": ("shapes:neutral", _PARITY, "distribution_parity", 1024),
    "compressibility": ("shapes:one:held_out", "jpeg_compressibility", "jpeg_compressibility", 400),
}


def arms() -> list[Arm]:
    tasks = yaml.safe_load((ROOT / "configs" / "shapes" / "joint.yaml").read_text())["tasks"]
    alone = [
        Arm(task["name"], "joint", (*_SHORT, "tasks", json.dumps([task]), "prompts.num_prompts", "8")) for task in tasks
    ]
    return [Arm("joint", "joint", _SHORT), *alone]


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    every = arms()
    curves = train_arms(every, arguments)
    took = {name: mean_and_error([rows[-1]["seconds"] for rows in seeds]) for name, seeds in curves.items()}
    scores = {task: _scores(task, every, arguments) for task in MEASURED}
    rows = [
        {"task": task, "arm": arm, "seed": seed, "score": score}
        for task, by_arm in scores.items()
        for arm, values in by_arm.items()
        for seed, score in zip(arguments.seeds if arm != "start" else [""], values, strict=True)
    ]
    write_csv(arguments.out.with_suffix(".csv"), rows)
    kept = {task: kept_share(by_arm, task) for task, by_arm in scores.items()}
    names = ["start", *curves]
    lines = [[name, *(shown(mean_and_error(scores[task][name])) for task in MEASURED)] for name in names]
    lines.append(["kept by the joint model", *(shown(kept[task], 2) for task in MEASURED)])
    print(markdown([["model", *MEASURED], ["---"] * 4, *lines]))
    means = {task: {arm: mean_and_error(values) for arm, values in own.items()} for task, own in scores.items()}
    return {"seconds": took, "scores": means, "kept": kept}


def _scores(task: str, arms: list[Arm], arguments: argparse.Namespace) -> dict[str, list[float]]:
    source, asked, answered, num_images = MEASURED[task]
    measured = (source, [asked], 4, num_images)
    start = start_score("shapes/lcm", arguments, *measured)
    found = scores_by_arm(arms, arguments, *measured)
    return {"start": [start[answered]], **{name: [one[answered] for one in seeds] for name, seeds in found.items()}}


def kept_share(scores: dict[str, list[float]], task: str) -> dict[str, float | None]:
    """scores: arm -> the task's score of each seed, "start" -> one number."""
    start = scores["start"][0]
    return share([score - start for score in scores["joint"]], [score - start for score in scores[task]])


if __name__ == "__main__":
    sys.exit(run_figure("joint", __doc__, draw))
