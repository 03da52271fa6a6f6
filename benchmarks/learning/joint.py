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
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from benchmarks.learning.arms import Arm, chosen_lrs, run_figure, run_folder, train_arms, tuned
from benchmarks.learning.exports import Exam, Score, scores_with_start
from benchmarks.learning.summaries import Statistics, markdown, named, over_seeds, plot_bars, share
from benchmarks.shared.reporting import ROOT, mean_and_error, write_csv

SCHEDULES = ("mixed", "by_task")
_LRS, _TUNING_SHARE = ("6e-5", "1.2e-4", "2.4e-4"), 1 / 4
_PARITY = "{name: distribution_parity, arguments: {classifier: shapes_colour, votes: hard}, group_size: 128}"
_GRADED = "{name: shapes_alignment_graded, arguments: {relation_weight: 0.25}}"


@dataclass(frozen=True)
class Measured:
    """How a task is scored."""

    exam: Exam
    weights: Mapping[str, float]  # of the rewards, by the names under which the exam answers

    def score(self, found: Score) -> float:
        """What the task optimises: the weighted sum of its rewards."""
        return sum(weight * found[name] for name, weight in self.weights.items())


MEASURED = {
    "alignment": Measured(
        Exam("shapes:two:held_out", (_GRADED, "shapes_alignment"), num_steps=4, num_images=1536),
        {"shapes_alignment_graded": 1.0},
    ),
    "parity": Measured(
        Exam("shapes:neutral", (_PARITY, "shapes_alignment"), num_steps=4, num_images=512),
        {"distribution_parity": 16.0, "shapes_alignment": 2.0},
    ),
    "compressibility": Measured(
        Exam("shapes:one:held_out", ("jpeg_compressibility", "shapes_alignment"), num_steps=4, num_images=256),
        {"jpeg_compressibility": 1.0, "shapes_alignment": 0.5},
    ),
}
Scores = dict[str, list[Score]]  # arm, or "start" with one -> for each seed


def arms() -> list[Arm]:
    """Arms with equal queries of each task; the gradients of the first one's tasks are measured."""
    config = yaml.safe_load((ROOT / "configs" / "shapes" / "joint.yaml").read_text())
    tasks, num_prompts = config["tasks"], config["prompts"]["num_prompts"]
    whole = sum(task.get("share", 1.0) for task in tasks)
    mixed = _arm("mixed", "task_schedule", "mixed", "tracking.task_gradients_every", "10")
    by_task = _arm("by_task", "task_schedule", "by_task")
    specialists = []
    for task in tasks:
        own_prompts = num_prompts * task.get("share", 1.0) / whole
        specialists.append(_arm(task["name"], "tasks", json.dumps([task]), "prompts.num_prompts", f"{own_prompts:g}"))
    return [mixed, by_task, *specialists]


def _arm(name: str, *overrides: str) -> Arm:
    """An arm of joint.yaml that is not evaluated while it trains."""
    return Arm(name, "joint", ("evaluation.every", "0", *overrides))


def add_by_task(parser: argparse.ArgumentParser) -> None:
    text = "the joint model whose tasks have an update each, in turn, too"
    parser.add_argument("--by_task", action="store_true", help=text)


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    # Train the arms, each at its best rate.
    asked = [arm for arm in arms() if arm.name != "by_task" or arguments.by_task]
    tuned_arms = tuned(asked, _LRS, _TUNING_SHARE, arguments)
    chosen = list(tuned_arms.values())
    curves = train_arms(chosen, arguments)
    took = {}
    for name, seeds in curves.items():
        took[name] = mean_and_error([rows[-1]["seconds"] for rows in seeds])

    # Score every model by what each task optimises.
    scores: dict[str, Scores] = {}
    for task, measured in MEASURED.items():
        scores[task] = scores_with_start(chosen, arguments, measured.exam, arguments.jobs)
    write_csv(arguments.out.with_suffix(".csv"), _rows(scores, arguments.seeds))

    # Compare the gains of the joint models with those of the specialists.
    gains = {task: gains_over_start(by_arm, task) for task, by_arm in scores.items()}
    plot_bars(gains, arguments.out.with_suffix(".png"), "gain over the start model")
    kept = {arm.name: kept_of(arm.name, gains) for arm in chosen if arm.name in SCHEDULES}
    means = {task: _means(by_arm) for task, by_arm in scores.items()}
    _print_tables(means, kept)
    gradients = _gradients(chosen[0], arguments)
    return {"lr": chosen_lrs(tuned_arms), "seconds": took, "scores": means, "kept": kept, "gradients": gradients}


def kept_of(joint: str, gains: Mapping[str, Mapping[str, Sequence[float]]]) -> dict[str, Statistics]:
    """task -> the share of its specialist's gain that a joint model has; gains: task -> arm -> of each seed."""
    return {task: share(of_arms[joint], of_arms[task]) for task, of_arms in gains.items()}


def _print_tables(means: Mapping[str, Mapping[str, Any]], kept: Mapping[str, Any]) -> None:
    for task, by_arm in means.items():
        lines = [named(arm, found) for arm, found in by_arm.items()]
        print(f"\n{task}\n{markdown(['model', *by_arm['start']], lines)}")
    lines = [named(arm, found, digits=2) for arm, found in kept.items()]
    print(f"\n{markdown(['kept', *MEASURED], lines)}")


def gains_over_start(scores: Scores, task: str) -> dict[str, list[float]]:
    """arm -> how much higher the task's score is than the start model's, for each seed."""
    score = MEASURED[task].score
    start = score(scores["start"][0])
    gains = {}
    for arm, seeds in scores.items():
        if arm != "start":
            gains[arm] = [score(found) - start for found in seeds]
    return gains


def _rows(scores: Mapping[str, Scores], seeds: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for task, by_arm in scores.items():
        for arm, found in by_arm.items():
            for seed, means in zip(seeds if arm != "start" else [""], found, strict=True):
                head = {"task": task, "arm": arm, "seed": seed}
                rows += [{**head, "reward": reward, "mean": mean} for reward, mean in _rewards_of(means).items()]
    return rows


def _means(scores: Scores) -> dict[str, dict[str, Any]]:
    """arm -> reward -> mean and error over seeds."""
    result = {}
    for arm, seeds in scores.items():
        result[arm] = over_seeds([_rewards_of(found) for found in seeds])
    return result


def _rewards_of(found: Score) -> Score:
    """A score without its seconds."""
    return {reward: mean for reward, mean in found.items() if reward != "seconds_per_image"}


def _gradients(arm: Arm, arguments: argparse.Namespace) -> dict[str, Any]:
    """gradient/... of the metrics, over iterations first and then over seeds."""
    of_seeds = []
    for seed in arguments.seeds:
        text = (run_folder(arguments.runs, arm, seed) / "metrics.jsonl").read_text()
        of_seeds.append(_mean_gradients([json.loads(line) for line in text.splitlines()]))
    return dict(sorted(over_seeds(of_seeds).items()))


def _mean_gradients(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """gradient/... -> its mean over the iterations that measured it."""
    values: dict[str, list[float]] = {}
    for line in lines:
        for key, value in line.items():
            if key.startswith("gradient/"):
                values.setdefault(key, []).append(value)
    return {key: statistics.fmean(found) for key, found in values.items()}


if __name__ == "__main__":
    sys.exit(run_figure("joint", __doc__, draw, add_by_task))
