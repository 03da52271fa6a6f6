"""Makes the evaluation of a run from its config: an evaluator for each source of prompts, and the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rlcm_fast.config import EvaluationConfig
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.prompts import load_prompts, prompts_for_images
from rlcm_fast.rewards import build_reward
from rlcm_fast.stages.evaluation import Evaluation, Evaluator, NamedRewards
from rlcm_fast.stages.held_out import HeldOut
from rlcm_fast.stages.image_sizes import Size
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.tasks import Tasks, skipped_names
from rlcm_fast.trajectory import Prompt


def build_evaluation(run: ResolvedRun, tasks: Tasks, images: TextToImage, engine: AveragingEngine) -> Evaluation:
    """Builds an evaluator for each source of prompts, with the rewards of its tasks and the rewards to watch.

    With several tasks the keys are `eval/TASK/...`; tasks with the same source share its images.
    """
    rewards: dict[str, dict[str, NamedRewards]] = {}  # source -> prefix -> rewards
    skipped: dict[str, frozenset[str]] = {}  # prefix -> names
    watched = skipped_names(run.config.evaluation.rewards)
    for task in run.tasks:
        prefix = f"eval/{task.name}" if run.has_tasks else "eval"
        rewards.setdefault(task.evaluation, {})[prefix] = {**tasks.watched, **tasks.trained[task.name]}
        skipped[prefix] = skipped_names(task.rewards) | (watched - tasks.trained[task.name].keys())
    config, sizes = run.config.evaluation, run.config.model.sizes
    evaluators = [
        replace(
            build_evaluator(replace(config, prompts=source), by_prefix, sizes),
            config=run.config.rollout,
            skipped=skipped,
            offloading=tasks.offloading,
        )
        for source, by_prefix in rewards.items()
    ]
    tracking = run.config.tracking
    prompts = grid_prompts(list(rewards), tracking.grid_images)
    grid = HeldOut(prompts, config.seed, len(prompts), sizes)
    return Evaluation(images, engine, evaluators, grid, tracking.evaluation_images)


def build_evaluator(
    config: EvaluationConfig, rewards: Mapping[str, NamedRewards], sizes: Sequence[Size] = ()
) -> Evaluator:
    """Builds an evaluator with rewards by prefix; on ShapesWorld it adds the detector, which no reward replaces."""
    if config.prompts.startswith("shapes:"):
        detector: NamedRewards = {"shapes_alignment": (build_reward("shapes_alignment", {}), 1.0)}
        rewards = {prefix: {**detector, **own} for prefix, own in rewards.items()}
    prompts = prompts_for_images(load_prompts(config.prompts, "evaluation.prompts"), config.num_images, config.seed)
    return Evaluator(HeldOut(prompts, config.seed, config.micro_batch_size, sizes), rewards)


def grid_prompts(sources: Sequence[str], num_images: int) -> list[Prompt]:
    """Returns the prompts of an image grid, spread over all prompts that the tasks are evaluated on."""
    share = max(1, num_images // len(sources))
    found: list[Prompt] = []
    for source in sources:
        prompts = load_prompts(source, "evaluation.prompts")
        found += prompts[:: max(1, len(prompts) // share)][:share]
    return found[:num_images]
