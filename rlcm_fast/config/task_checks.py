"""Checks the tasks of a run: names, whole prompts for every process, enough images for their advantages."""

from __future__ import annotations

from rlcm_fast.config import Config
from rlcm_fast.config.resolved import ResolvedRun, Task


def check_tasks(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" for the first task that cannot work on that many processes."""
    _check_names(run.config)
    for index, task in enumerate(run.tasks):
        _check_prompts(run, index)
        _check_advantages(run.config, task)
        if task.num_samples < 2:
            if run.has_tasks:
                share = f"tasks[{index}].share={run.config.tasks[index].share}"
                raise ValueError(f"{share} gives task {task.name} one image, so no spread of rewards; give it more")
            raise ValueError("prompts.num_prompts=1 with images_per_prompt=1 has no spread of rewards; give 2")


def _check_names(config: Config) -> None:
    """Refuses tasks without a distinct name, because names become part of the keys of metrics."""
    names = [task.name for task in config.tasks]
    for index, name in enumerate(names):
        where = f"tasks[{index}]"
        if not name.strip() or "/" in name:
            raise ValueError(f"{where}.name='{name}' is no name; give a word without '/', as alignment")
        if names.index(name) < index:
            raise ValueError(f"{where}.name={name} is already that of another task; give each its own")


def _check_prompts(run: ResolvedRun, index: int) -> None:
    """Refuses prompts that the processes cannot share evenly."""
    config, world_size = run.config, run.sizes.num_processes
    task, prompts = run.tasks[index], config.prompts
    num_prompts = task.num_prompts
    if not run.has_tasks and num_prompts % world_size:
        up = -(-prompts.num_prompts // world_size) * world_size
        raise ValueError(f"prompts.num_prompts={num_prompts} does not divide by the {world_size} processes; try {up}")
    if num_prompts != int(num_prompts) or num_prompts % world_size:
        raise ValueError(
            f"tasks[{index}].share={config.tasks[index].share} gives task {task.name} {num_prompts:g} prompts with "
            f"{task.images_per_prompt} images each of the {prompts.num_prompts * prompts.images_per_prompt} images of "
            f"an iteration, which {world_size} processes cannot share evenly; change shares, prompts.num_prompts or "
            "images_per_prompt"
        )


def _check_advantages(config: Config, task: Task) -> None:
    """Refuses a task whose prompts have too few images, or too few earlier ones, to compare with."""
    images, advantages = task.images_per_prompt, config.advantages
    if task.advantages in ("group", "leave_one_out") and images < 2:
        raise ValueError(
            f"{task.images_field}={images} makes no group for {task.advantages_field}={task.advantages}; give 2 or more"
        )
    if task.advantages == "prompt" and not 2 <= advantages.min_count <= advantages.buffer_size:
        remedy = f"give 2 to {advantages.buffer_size}, or a larger advantages.buffer_size"
        raise ValueError(
            f"advantages.min_count={advantages.min_count} must lie between 2 and "
            f"advantages.buffer_size={advantages.buffer_size}; {remedy}"
        )
