"""Binds a guard to the evaluation whose images it watches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from rlcm_fast.config import GuardConfig
from rlcm_fast.config.guard import WITHIN
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.plugins import build
from rlcm_fast.prompts import load_prompts, prompts_for_images
from rlcm_fast.rewards import GroupReward
from rlcm_fast.rewards.diversity import EMBEDDINGS
from rlcm_fast.run_folder.guard_pictures import GuardPictures
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.evaluation import Evaluation, Evaluator, NamedRewards
from rlcm_fast.stages.guard import Describe, Guard, HeldOutReward
from rlcm_fast.stages.kl_weight import KlWeight
from rlcm_fast.tasks import Tasks


def build_describe(run: ResolvedRun) -> Describe | None:
    """Builds what a guard sees in an image, with the embedding's model; None without a guard.

    Raises:
        ValueError: the embedding is unknown, its model is missing, or the evaluation lacks two images of a prompt that
            a measure needs; no weights of the run are loaded yet.
    """
    config = run.config.guard
    if not config.is_on:
        if config != GuardConfig():
            say("guard.action=off: the other settings of guard do nothing; warn, raise_kl or stop would use them")
        return None
    _check_repeats(run)
    return Describe(build(config.embedding, {}, EMBEDDINGS, "guard.embedding"))


def _check_repeats(run: ResolvedRun) -> None:
    """Refuses to name diversity_within if the evaluation has one image of each prompt."""
    guard, evaluation = run.config.guard, run.config.evaluation
    named = [field for field in ("watch", "acts_on", "floors") if WITHIN in getattr(guard, field)]
    if not named:
        return
    drawn = []
    for source in {task.evaluation for task in run.tasks}:
        prompts = load_prompts(source, "evaluation.prompts")
        drawn += prompts_for_images(prompts, evaluation.num_images, evaluation.seed)
    if len(set(drawn)) == len(drawn):
        raise ValueError(
            f"guard.{named[0]} names {WITHIN}, and evaluation.num_images={evaluation.num_images} gives each prompt one "
            "image; give more images than evaluation.prompts has prompts, or name diversity_across"
        )


def with_guard(
    evaluation: Evaluation, run: ResolvedRun, tasks: Tasks, describe: Describe | None, kl_weight: KlWeight
) -> Evaluation:
    """Returns the evaluation with the guard that the config asks for; kl_weight is what it may move."""
    if describe is None:
        return evaluation
    trained = {f"eval/{task.name}" if run.has_tasks else "eval": tasks.trained[task.name] for task in run.tasks}
    guarding = [_held_out(evaluator, trained) for evaluator in evaluation.evaluators]
    rewards = [reward for evaluator in guarding for reward in _described(evaluator)]
    pictures = GuardPictures(Path(run.config.run_dir) / "guard")
    guard = Guard(run.config.guard, rewards, kl_weight, describe, pictures, run.config.num_iterations)
    return replace(evaluation, guard=guard, guarding=guarding)


def _held_out(evaluator: Evaluator, trained: Mapping[str, NamedRewards]) -> Evaluator:
    """Returns the evaluator without the rewards that the task of their prefix trains on."""
    kept: dict[str, NamedRewards] = {}
    for prefix, rewards in evaluator.rewards.items():
        others = {name: reward for name, reward in rewards.items() if name not in trained[prefix]}
        if others:
            kept[prefix] = others
    return replace(evaluator, rewards=kept)


def _described(evaluator: Evaluator) -> list[HeldOutReward]:
    """Lists the rewards of an evaluator, with the number of values that each mean is of."""
    num_images = len(evaluator.held_out.prompts)
    found = []
    for prefix, rewards in evaluator.rewards.items():
        for name, (reward, _) in rewards.items():
            num_values = len(reward.groups(num_images)) if isinstance(reward, GroupReward) else num_images
            found.append(HeldOutReward(f"{prefix}/{name}".removeprefix("eval/"), num_values))
    return found
