"""What follows from a config on a number of processes: tasks, rounds and sizes, worked out once.

config -> (checks.py) -> resolve -> ResolvedRun -> build.py gives each part what it needs of it
"""

from __future__ import annotations

from dataclasses import dataclass

from rlcm_fast.config import Config
from rlcm_fast.config.tasks import Task, tasks_of


@dataclass(frozen=True)
class Sizes:
    """How much an iteration has to do; counts are over all processes unless the name says otherwise.

    Of updates of different sizes (tasks one by one) the largest is meant.
    """

    num_processes: int
    samples_per_iteration: int
    samples_per_process: int
    samples_per_rollout: int  # of all processes; an iteration has a rollout for each round
    actions_per_sample: int
    trained_actions_per_sample: int
    transitions_per_iteration: int
    transitions_per_update: int
    micro_batches_per_update_and_process: int
    real_image_micro_batches: int  # of an update, on each process
    updates_per_iteration: int
    total_updates: int
    total_queries: int


@dataclass(frozen=True)
class ResolvedRun:
    """A config and what follows from it."""

    config: Config
    tasks: tuple[Task, ...]  # in the order of the config; one called "default" where it names none
    rounds: tuple[tuple[Task, ...], ...]  # which tasks share a rollout and its updates; an iteration is all rounds
    sizes: Sizes

    @property
    def has_tasks(self) -> bool:
        """Whether the config names tasks, which are then part of the keys of metrics."""
        return bool(self.config.tasks)


def resolve(config: Config, world_size: int) -> ResolvedRun:
    """Works out what follows from a valid config; `checks.validate` says whether it is valid."""
    tasks = tuple(tasks_of(config))
    rounds = tuple((task,) for task in tasks) if config.task_schedule == "by_task" else (tasks,)
    return ResolvedRun(config, tasks, rounds, _sizes(config, rounds, world_size))


def _sizes(config: Config, rounds: tuple[tuple[Task, ...], ...], world_size: int) -> Sizes:
    samples = [sum(task.num_samples for task in tasks) for tasks in rounds]
    actions = config.policy.num_steps - (config.policy.last_step == "deterministic")
    trained = config.update.num_timesteps or actions
    transitions_per_update = max(samples) * trained // config.update.num_updates
    updates = config.update.num_passes * config.update.num_updates * len(rounds)
    real_images = config.pretraining
    pairs = real_images.batch_size if real_images.weight > 0 else 0
    return Sizes(
        num_processes=world_size,
        samples_per_iteration=sum(samples),
        samples_per_process=sum(samples) // world_size,
        samples_per_rollout=max(samples),
        actions_per_sample=actions,
        trained_actions_per_sample=trained,
        transitions_per_iteration=sum(samples) * trained,
        transitions_per_update=transitions_per_update,
        micro_batches_per_update_and_process=transitions_per_update // world_size // config.update.micro_batch_size,
        real_image_micro_batches=pairs // world_size // real_images.micro_batch_size,
        updates_per_iteration=updates,
        total_updates=updates * config.num_iterations,
        total_queries=sum(samples) * config.num_iterations,
    )
