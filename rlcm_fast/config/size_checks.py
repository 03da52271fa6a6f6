"""Checks that batches, groups, updates and micro-batches divide evenly, over all processes."""

from __future__ import annotations

from collections.abc import Sequence

from rlcm_fast.config import Config, RewardConfig, bounds
from rlcm_fast.config.batches import divisors
from rlcm_fast.config.resolved import ResolvedRun, Task


def check_sizes(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" for the first number that another does not divide."""
    samples, most = run.sizes.samples_per_iteration, bounds.IMAGES
    if samples > most.most:
        raise ValueError(
            f"prompts.num_prompts={run.config.prompts.num_prompts} times "
            f"images_per_prompt={run.config.prompts.images_per_prompt} are {samples:,} images of an iteration; give at "
            f"most {most}: {most.reason}"
        )
    for tasks in run.rounds:
        _check_updates(run, tasks)
    _check_groups(run)
    _check_pretraining(run.config, run.sizes.num_processes)


def _check_updates(run: ResolvedRun, tasks: Sequence[Task]) -> None:
    """Refuses updates that do not share a round's transitions evenly, and micro-batches that do not fill an update."""
    # Transitions of a pass divide into updates; check_tasks has seen to it that prompts are whole.
    update, world_size = run.config.update, run.sizes.num_processes
    of = f" of task {tasks[0].name}" if run.config.task_schedule == "by_task" and run.has_tasks else ""
    samples = sum(task.num_samples for task in tasks)
    transitions = samples * run.sizes.trained_actions_per_sample // world_size
    if transitions % update.num_updates:
        raise ValueError(
            f"update.num_updates={update.num_updates} does not divide the {transitions} transitions of a pass "
            f"on each process{of}; try {_near_divisors(transitions, update.num_updates)}"
        )

    # So do pairs of images, if the algorithm takes pairs.
    pairs = samples // world_size // 2
    if run.config.algorithm.name == "rebel" and pairs % update.num_updates:
        raise ValueError(
            f"update.num_updates={update.num_updates} does not divide the {pairs} pairs of images that "
            f"algorithm.name=rebel has on each process{of}; try {_near_divisors(pairs, update.num_updates)}"
        )

    # Transitions of an update divide into micro-batches.
    in_update = transitions // update.num_updates
    if in_update % update.micro_batch_size:
        raise ValueError(
            f"update.micro_batch_size={update.micro_batch_size} does not divide the {in_update} transitions "
            f"of an update on each process{of}; try {_near_divisors(in_update, update.micro_batch_size)}"
        )


def _check_groups(run: ResolvedRun) -> None:
    """Refuses groups of set rewards that are not whole, in a rollout on each process or in an evaluation of all."""
    evaluation = run.config.evaluation
    watched = {f"evaluation.rewards[{i}]": reward for i, reward in enumerate(evaluation.rewards)}
    for task in run.tasks:
        of = f" of task {task.name}" if run.has_tasks else ""
        trained = {f"{task.rewards_field}[{i}]": reward for i, reward in enumerate(task.rewards)}
        samples = task.num_samples // run.sizes.num_processes
        for field, reward in trained.items():
            if reward.credit == "leave_one_out" and (reward.group_size or samples) == 1:
                remedy = f"set {field}.group_size to 2 or more"
                raise ValueError(f"{field}.credit=leave_one_out leaves nothing of a group of one image; {remedy}")
            _check_group(field, reward, samples, f"the {samples} samples of an iteration on each process{of}")
        if evaluation.every > 0:
            images = evaluation.num_images
            for field, reward in {**trained, **watched}.items():
                _check_group(field, reward, images, f"evaluation.num_images={images}")


def _check_group(field: str, reward: RewardConfig, num_images: int, images: str) -> None:
    size = reward.group_size
    if size and num_images % size:
        near = _near_divisors(num_images, size)
        raise ValueError(f"{field}.group_size={size} does not divide {images}; try {near}, or change their number")


def _check_pretraining(config: Config, world_size: int) -> None:
    """Refuses a loss on real images without pairs, or with pairs that do not divide evenly."""
    # There must be pairs.
    pretraining = config.pretraining
    if pretraining.weight == 0:
        return
    if not pretraining.data.strip():
        raise ValueError(
            f"pretraining.weight={pretraining.weight} needs pretraining.data: a folder of captioned images, a .jsonl"
            " file, .tar shards, hf:PATH or shapes:all; name one, or set pretraining.weight=0"
        )

    # Pairs of an update divide into processes and micro-batches.
    size = pretraining.batch_size
    if size % world_size:
        up = -(-size // world_size) * world_size
        raise ValueError(f"pretraining.batch_size={size} does not divide by the {world_size} processes; try {up}")
    share, micro = size // world_size, pretraining.micro_batch_size
    if share % micro:
        raise ValueError(
            f"pretraining.micro_batch_size={micro} does not divide the {share} pairs of an update on each process;"
            f" try {_near_divisors(share, micro)}"
        )


def _near_divisors(number: int, wish: int) -> str:
    """Returns the divisors of `number` next to `wish`, as '32 or 48'."""
    found = divisors(number, number)
    below, above = [n for n in found if n < wish][:1], [n for n in found if n > wish][-1:]
    return " or ".join(str(n) for n in below + above)
