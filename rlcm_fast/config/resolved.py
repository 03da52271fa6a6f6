"""Works out once what follows from a config and a number of processes: tasks, rounds and sizes.

    config -> checks.validate -> ResolvedRun -> build.py gives each part what it needs

A batch has prompts.num_prompts x prompts.images_per_prompt images; several tasks divide it by their shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlcm_fast.config import Config, RewardConfig, TaskConfig
from rlcm_fast.config.image_sizes import prompts_of_blocks


@dataclass(frozen=True)
class Task:
    """A prompt source with its rewards, its share of the batch, its kind of advantages and its evaluation prompts."""

    name: str
    source: str
    rewards: Sequence[RewardConfig]
    num_prompts: float  # in an iteration, over all processes; a fraction is an error that `check_tasks` words
    images_per_prompt: int
    advantages: str
    rewards_combine: str
    evaluation: str
    # The fields that set these, for messages.
    source_field: str = field(default="prompts.source", compare=False)
    rewards_field: str = field(default="rewards", compare=False)
    images_field: str = field(default="prompts.images_per_prompt", compare=False)
    advantages_field: str = field(default="advantages.kind", compare=False)
    combine_field: str = field(default="rewards_combine", compare=False)
    evaluation_field: str = field(default="evaluation.prompts", compare=False)

    @property
    def num_samples(self) -> int:
        """Number of images in an iteration, over all processes."""
        return round(self.num_prompts * self.images_per_prompt)


@dataclass(frozen=True)
class Sizes:
    """The amount of work in an iteration; counts are over all processes unless the name says otherwise.

    If updates differ in size (tasks one by one), the sizes are those of the largest.
    """

    num_processes: int
    samples_per_iteration: int
    samples_per_process: int
    samples_per_rollout: int  # of all processes; an iteration has a rollout for each round
    actions_per_sample: int
    trained_actions_per_sample: int
    transitions_per_iteration: int
    transitions_per_update: int
    micro_batches_per_update_and_process: int  # at most, if images have several sizes
    real_image_micro_batches: int  # of an update, on each process
    updates_per_iteration: int
    total_updates: int
    total_queries: int


@dataclass(frozen=True)
class ResolvedRun:
    """A config and what follows from it."""

    config: Config
    tasks: tuple[Task, ...]  # in the order of the config; one task called "default" if it names none
    rounds: tuple[tuple[Task, ...], ...]  # which tasks share a rollout and its updates; an iteration is all rounds
    sizes: Sizes

    @property
    def has_tasks(self) -> bool:
        """Tells whether the config names tasks; then task names are part of the keys of metrics."""
        return bool(self.config.tasks)


def resolve(config: Config, world_size: int) -> ResolvedRun:
    """Works out what follows from a config whose numbers are in range; `checks.validate` says whether it can work."""
    tasks = tuple(_tasks_of(config))
    rounds = tuple((task,) for task in tasks) if config.task_schedule == "by_task" else (tasks,)
    return ResolvedRun(config, tasks, rounds, _sizes(config, rounds, world_size))


def _tasks_of(config: Config) -> list[Task]:
    """In the order of the config; one task called "default" if it names none."""
    prompts = config.prompts
    if config.tasks:
        return [_task(config, index, task) for index, task in enumerate(config.tasks)]
    return [
        Task(
            name="default",
            source=prompts.source,
            rewards=config.rewards,
            num_prompts=prompts.num_prompts,
            images_per_prompt=prompts.images_per_prompt,
            advantages=config.advantages.kind,
            rewards_combine=config.rewards_combine,
            evaluation=config.evaluation.prompts,
        )
    ]


def _task(config: Config, index: int, task: TaskConfig) -> Task:
    """Returns one of several tasks; the top-level sections fill in what it leaves out."""
    # Count its prompts; a fraction is an error that `check_tasks` words.
    prompts, place = config.prompts, f"tasks[{index}]"
    images_per_prompt = task.images_per_prompt or prompts.images_per_prompt
    images = prompts.num_prompts * prompts.images_per_prompt
    num_prompts = images * task.share / sum(other.share for other in config.tasks) / images_per_prompt
    is_whole = abs(num_prompts - round(num_prompts)) < 1e-9

    # Take each setting from the task or from its section, and note which of the two.
    return Task(
        name=task.name,
        source=task.source,
        rewards=task.rewards,
        num_prompts=round(num_prompts) if is_whole else num_prompts,
        images_per_prompt=images_per_prompt,
        advantages=task.advantages or config.advantages.kind,
        rewards_combine=task.rewards_combine or config.rewards_combine,
        evaluation=task.evaluation or config.evaluation.prompts,
        source_field=f"{place}.source",
        rewards_field=f"{place}.rewards",
        images_field=f"{place}.images_per_prompt" if task.images_per_prompt else "prompts.images_per_prompt",
        advantages_field=f"{place}.advantages" if task.advantages else "advantages.kind",
        combine_field=f"{place}.rewards_combine" if task.rewards_combine else "rewards_combine",
        evaluation_field=f"{place}.evaluation" if task.evaluation else "evaluation.prompts",
    )


def _sizes(config: Config, rounds: tuple[tuple[Task, ...], ...], world_size: int) -> Sizes:
    # Count samples, trained actions, updates and pairs of real images.
    samples = [sum(task.num_samples for task in tasks) for tasks in rounds]
    actions = config.policy.num_steps - (config.policy.last_step == "deterministic")
    trained = config.update.num_timesteps or actions
    transitions_per_update = max(samples) * trained // config.update.num_updates
    micro_batches = transitions_per_update // world_size // config.update.micro_batch_size
    if len(config.model.image_sizes) > 1:
        micro_batches = max(_micro_batches_of_sizes(config, tasks, trained, world_size) for tasks in rounds)
    updates = config.update.num_passes * config.update.num_updates * len(rounds)
    real_images = config.pretraining
    pairs = real_images.batch_size if real_images.weight > 0 else 0

    # Multiply them out.
    return Sizes(
        num_processes=world_size,
        samples_per_iteration=sum(samples),
        samples_per_process=sum(samples) // world_size,
        samples_per_rollout=max(samples),
        actions_per_sample=actions,
        trained_actions_per_sample=trained,
        transitions_per_iteration=sum(samples) * trained,
        transitions_per_update=transitions_per_update,
        micro_batches_per_update_and_process=micro_batches,
        real_image_micro_batches=pairs // world_size // real_images.micro_batch_size,
        updates_per_iteration=updates,
        total_updates=updates * config.num_iterations,
        total_queries=sum(samples) * config.num_iterations,
    )


def _micro_batches_of_sizes(config: Config, tasks: Sequence[Task], trained: int, world_size: int) -> int:
    """Returns the most micro-batches of an update on each process, if each holds images of one size.

    An update takes an equal share of each size's transitions, rounded up to whole ones, or to whole pairs for rebel.
    """
    # Count the images that a process draws of each size.
    samples = [0] * len(config.model.image_sizes)
    for task in tasks:
        blocks = prompts_of_blocks(max(1, round(task.num_prompts) // world_size), len(samples))
        for block, count in enumerate(blocks):
            samples[block] += count * task.images_per_prompt

    # Divide their transitions among the updates and into micro-batches.
    unit = 2 * trained if config.algorithm.name == "rebel" else 1
    shares = [-(-count * trained // (unit * config.update.num_updates)) * unit for count in samples]
    return sum(-(-share // config.update.micro_batch_size) for share in shares)
