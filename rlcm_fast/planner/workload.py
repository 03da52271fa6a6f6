"""How much an iteration has to do on one process: the counts that memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass

from rlcm_fast.config import Config
from rlcm_fast.config.checks import derived
from rlcm_fast.config.sizes import num_trained
from rlcm_fast.config.tasks import rounds_of


@dataclass(frozen=True)
class Workload:
    """An iteration of one process."""

    num_processes: int
    samples: int
    samples_at_once: int  # in one rollout, the largest one if tasks take turns
    num_steps: int
    num_actions: int
    num_trained: int  # actions per sample that are trained
    num_passes: int
    transitions_per_update: int
    num_updates: int  # in all passes together
    pairs_per_update: int  # of real images and captions
    recomputes_log_probs: bool = False

    @classmethod
    def of(cls, config: Config, num_processes: int) -> Workload:
        numbers = derived(config, num_processes)
        pretraining = config.pretraining
        return cls(
            num_processes,
            numbers["samples_per_process"],
            max(sum(task.num_samples for task in tasks) for tasks in rounds_of(config)) // num_processes,
            config.policy.num_steps,
            numbers["actions_per_sample"],
            num_trained(config),
            config.update.num_passes,
            numbers["transitions_per_update"] // num_processes,
            numbers["updates_per_iteration"],
            pretraining.batch_size // num_processes if pretraining.weight > 0 else 0,
            config.update.recomputes_log_probs,
        )
