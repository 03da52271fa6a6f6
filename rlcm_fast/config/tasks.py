"""The tasks of a run as its config resolves them: one where `tasks` is empty, and how many images each has.

A batch is of prompts.num_prompts x prompts.images_per_prompt images; several tasks divide it by their shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlcm_fast.config import Config, RewardConfig


@dataclass(frozen=True)
class Task:
    """A prompt source, its rewards, its share of the batch, its kind of advantages and what it is evaluated on."""

    name: str
    source: str
    rewards: Sequence[RewardConfig]
    num_prompts: float  # of an iteration, over all processes; a fraction is an error that `check_tasks` words
    images_per_prompt: int
    advantages: str
    evaluation: str
    # Where these were set, for messages.
    source_field: str = field(default="prompts.source", compare=False)
    rewards_field: str = field(default="rewards", compare=False)
    images_field: str = field(default="prompts.images_per_prompt", compare=False)
    advantages_field: str = field(default="advantages.kind", compare=False)
    evaluation_field: str = field(default="evaluation.prompts", compare=False)

    @property
    def num_samples(self) -> int:
        """Of an iteration, over all processes."""
        return round(self.num_prompts * self.images_per_prompt)


def tasks_of(config: Config) -> list[Task]:
    """In the order of the config; one called "default" where it names none."""
    prompts, kind, evaluation = config.prompts, config.advantages.kind, config.evaluation.prompts
    if not config.tasks:
        counts = (prompts.num_prompts, prompts.images_per_prompt)
        return [Task("default", prompts.source, config.rewards, *counts, kind, evaluation)]
    images = prompts.num_prompts * prompts.images_per_prompt
    whole = sum(task.share for task in config.tasks)
    tasks = []
    for index, task in enumerate(config.tasks):
        per_prompt = task.images_per_prompt or prompts.images_per_prompt
        num_prompts = images * task.share / whole / per_prompt
        counts = (round(num_prompts) if abs(num_prompts - round(num_prompts)) < 1e-9 else num_prompts, per_prompt)
        own = (task.advantages or kind, task.evaluation or evaluation)
        at = f"tasks[{index}]"
        fields = (
            f"{at}.source",
            f"{at}.rewards",
            f"{at}.images_per_prompt" if task.images_per_prompt else "prompts.images_per_prompt",
            f"{at}.advantages" if task.advantages else "advantages.kind",
            f"{at}.evaluation" if task.evaluation else "evaluation.prompts",
        )
        tasks.append(Task(task.name, task.source, task.rewards, *counts, *own, *fields))
    return tasks


def rounds_of(config: Config) -> list[list[Task]]:
    """Which tasks share a rollout and its updates, in turn; an iteration is all rounds."""
    tasks = tasks_of(config)
    return [[task] for task in tasks] if config.task_schedule == "by_task" else [tasks]


def check_task_names(config: Config) -> None:
    """Each task has a name of its own, which becomes part of the keys of metrics."""
    names = [task.name for task in config.tasks]
    for index, task in enumerate(config.tasks):
        where = f"tasks[{index}]"
        if not task.name.strip() or "/" in task.name:
            raise ValueError(f"{where}.name='{task.name}' is no name; give a word without '/', as alignment")
        if names.index(task.name) < index:
            raise ValueError(f"{where}.name={task.name} is already that of another task; give each its own")


def check_tasks(config: Config, world_size: int) -> None:
    """Every task has whole prompts for every process, and enough of them for its kind of advantages."""
    advantages = config.advantages
    for index, task in enumerate(tasks_of(config)):
        _check_prompts(config, index, task, world_size)
        images = task.images_per_prompt
        if task.advantages in ("group", "leave_one_out") and images < 2:
            raise ValueError(
                f"{task.images_field}={images} makes no group for {task.advantages_field}={task.advantages}; give 2 or "
                "more"
            )
        if task.advantages == "prompt" and not 2 <= advantages.min_count <= advantages.buffer_size:
            remedy = f"give 2 to {advantages.buffer_size}, or a larger advantages.buffer_size"
            raise ValueError(
                f"advantages.min_count={advantages.min_count} must lie between 2 and "
                f"advantages.buffer_size={advantages.buffer_size}; {remedy}"
            )
        if task.num_samples < 2:
            if config.tasks:
                share = f"tasks[{index}].share={config.tasks[index].share}"
                raise ValueError(f"{share} gives task {task.name} one image, so no spread of rewards; give it more")
            raise ValueError("prompts.num_prompts=1 with images_per_prompt=1 has no spread of rewards; give 2")


def _check_prompts(config: Config, index: int, task: Task, world_size: int) -> None:
    num_prompts = task.num_prompts
    if not config.tasks and num_prompts % world_size:
        up = -(-config.prompts.num_prompts // world_size) * world_size
        raise ValueError(f"prompts.num_prompts={num_prompts} does not divide by the {world_size} processes; try {up}")
    if num_prompts != int(num_prompts) or num_prompts % world_size:
        images = config.prompts.num_prompts * config.prompts.images_per_prompt
        raise ValueError(
            f"tasks[{index}].share={config.tasks[index].share} gives task {task.name} {num_prompts:g} prompts with "
            f"{task.images_per_prompt} images each of the {images} images of an iteration, which {world_size} processes"
            " cannot share evenly; change shares, prompts.num_prompts or images_per_prompt"
        )
