"""Joint training against specialists: the share of each specialist's gain that one model of all three tasks keeps.

    python benchmarks/learning/joint.py --jobs 2
    python benchmarks/learning/joint.py --by_task --jobs 2    # the paper's schedule beside it, from there

The joint arms are of configs/shapes/joint.yaml, `mixed` with all tasks in one update, `by_task` with an update for each
in turn. A specialist has one of its tasks alone, with as many images of it (128 of alignment, 64 of each other task),
as many iterations and the same KL weight, so each task has had equal queries. Learning rates are by a sweep of short
runs, the same for each arm, a joint one judged by all its tasks. Afterwards every model is scored by what each task
optimises, and by the detector's exact score: alignment on held-out captions of two shapes, compressibility on held-out
captions of one; parity on 128 images of each neutral caption, the trained ones, which are all there are. kept = a joint
model's gain over the start model / the specialist's. The gradients of the tasks are measured every ten iterations of
the mixed arm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.learning.arms import Arm, run_figure, run_folder, train_arms, tuned
from benchmarks.learning.exports import scores_by_arm, start_score
from benchmarks.learning.summaries import markdown, plot_bars, share, shown
from benchmarks.shared.reporting import ROOT, mean_and_error, write_csv

SCHEDULES = ("mixed", "by_task")
_NO_EVALUATION = ("evaluation.every", "0")
_LRS, _TUNING_SHARE = ("6e-5", "1.2e-4", "2.4e-4"), 1 / 4
_PARITY = "{name: distribution_parity, arguments: {classifier: shapes_colour, votes: hard}, group_size: 128}"
_GRADED = "{name: shapes_alignment_graded, arguments: {relation_weight: 0.25}}"


@dataclass(frozen=True)
class Measured:
    """How a task is scored: `weights` of rewards as they are answered, asked for as `rewards`."""

    source: str
    rewards: tuple[str, ...]
    weights: Mapping[str, float]
    num_images: int

    def score(self, found: Mapping[str, float]) -> float:
        return sum(weight * found[name] for name, weight in self.weights.items())


MEASURED = {
    "alignment": Measured("shapes:two:held_out", (_GRADED, "shapes_alignment"), {"shapes_alignment_graded": 1.0}, 1536),
    "parity": Measured(
        "shapes:neutral", (_PARITY, "shapes_alignment"), {"distribution_parity": 16.0, "shapes_alignment": 2.0}, 512
    ),
    "compressibility": Measured(
        "shapes:one:held_out",
        ("jpeg_compressibility", "shapes_alignment"),
        {"jpeg_compressibility": 1.0, "shapes_alignment": 0.5},
        256,
    ),
}
Scores = dict[str, list[dict[str, float]]]  # arm, or "start" with one -> reward -> mean, for each seed


def arms() -> list[Arm]:
    """With equal queries of each task; the gradients of the first one's tasks are measured."""
    config = yaml.safe_load((ROOT / "configs" / "shapes" / "joint.yaml").read_text())
    tasks, num_prompts = config["tasks"], config["prompts"]["num_prompts"]
    whole = sum(task.get("share", 1.0) for task in tasks)
    own = {name: ("task_schedule", name) for name in SCHEDULES}
    own |= {task["name"]: _alone(task, num_prompts * task.get("share", 1.0) / whole) for task in tasks}
    every = [Arm(name, "joint", (*_NO_EVALUATION, *overrides)) for name, overrides in own.items()]
    return [every[0].but("tracking.task_gradients_every", "10"), *every[1:]]


def _alone(task: Mapping[str, Any], num_prompts: float) -> tuple[str, ...]:
    return ("tasks", json.dumps([task]), "prompts.num_prompts", f"{num_prompts:g}")


def add_by_task(parser: argparse.ArgumentParser) -> None:
    text = "the joint model whose tasks have an update each, in turn, too"
    parser.add_argument("--by_task", action="store_true", help=text)


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    asked = [arm for arm in arms() if arm.name != "by_task" or arguments.by_task]
    chosen = list(tuned(asked, _LRS, _TUNING_SHARE, arguments).values())
    curves = train_arms(chosen, arguments)
    took = {name: mean_and_error([rows[-1]["seconds"] for rows in seeds]) for name, seeds in curves.items()}
    scores = {task: _scores(measured, chosen, arguments) for task, measured in MEASURED.items()}
    write_csv(arguments.out.with_suffix(".csv"), _rows(scores, arguments.seeds))
    gains = {task: gains_over_start(by_arm, task) for task, by_arm in scores.items()}
    plot_bars(gains, arguments.out.with_suffix(".png"), "gain over the start model")
    joint = [arm.name for arm in chosen if arm.name in SCHEDULES]
    kept = {name: {task: share(own[name], own[task]) for task, own in gains.items()} for name in joint}
    means = {task: _means(by_arm) for task, by_arm in scores.items()}
    for task, by_arm in means.items():
        lines = [[arm, *(shown(value) for value in found.values())] for arm, found in by_arm.items()]
        print(f"\n{task}\n" + markdown([["model", *by_arm["start"]], ["---"] * (1 + len(by_arm["start"])), *lines]))
    lines = [[name, *(shown(value, 2) for value in found.values())] for name, found in kept.items()]
    print("\n" + markdown([["kept", *MEASURED], ["---"] * 4, *lines]))
    lrs = {arm.name: arm.overrides[-1] for arm in chosen}
    return {"lr": lrs, "seconds": took, "scores": means, "kept": kept, "gradients": _gradients(chosen[0], arguments)}


def _scores(measured: Measured, arms: list[Arm], arguments: argparse.Namespace) -> Scores:
    asked = (measured.source, measured.rewards, 4, measured.num_images)
    return {
        "start": [start_score("shapes/lcm", arguments, *asked)],
        **scores_by_arm(arms, arguments, *asked, arguments.jobs),
    }


def gains_over_start(scores: Scores, task: str) -> dict[str, list[float]]:
    """arm -> how much higher the task's score is than the start model's, for each seed."""
    score = MEASURED[task].score
    start = score(scores["start"][0])
    return {arm: [score(found) - start for found in seeds] for arm, seeds in scores.items() if arm != "start"}


def _rows(scores: Mapping[str, Scores], seeds: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"task": task, "arm": arm, "seed": seed, "reward": reward, "mean": mean}
        for task, by_arm in scores.items()
        for arm, found in by_arm.items()
        for seed, means in zip(seeds if arm != "start" else [""], found, strict=True)
        for reward, mean in means.items()
        if reward != "seconds_per_image"
    ]


def _means(scores: Scores) -> dict[str, dict[str, Any]]:
    """arm -> reward -> mean and error over seeds."""
    rewards = [reward for reward in scores["start"][0] if reward != "seconds_per_image"]
    return {
        arm: {reward: mean_and_error([one[reward] for one in seeds]) for reward in rewards}
        for arm, seeds in scores.items()
    }


def _gradients(arm: Arm, arguments: argparse.Namespace) -> dict[str, Any]:
    """gradient/... of the metrics, over iterations first and then over seeds."""
    folders = [run_folder(arguments.runs, arm, seed) for seed in arguments.seeds]
    lines = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    keys = sorted({key for line in itertools.chain(*lines) for key in line if key.startswith("gradient/")})
    return {
        key: mean_and_error([statistics.fmean(line[key] for line in seed if key in line) for seed in lines])
        for key in keys
    }


if __name__ == "__main__":
    sys.exit(run_figure("joint", __doc__, draw, add_by_task))
