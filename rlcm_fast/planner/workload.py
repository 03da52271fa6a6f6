"""How much an iteration has to do on one process: the counts that memory and time follow from."""

from __future__ import annotations

from dataclasses import dataclass

from rlcm_fast.config.resolved import ResolvedRun


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
    num_image_sizes: int = 1

    @classmethod
    def of(cls, run: ResolvedRun) -> Workload:
        sizes, update, real_images = run.sizes, run.config.update, run.config.pretraining
        return cls(
            num_processes=sizes.num_processes,
            samples=sizes.samples_per_process,
            samples_at_once=sizes.samples_per_rollout // sizes.num_processes,
            num_steps=run.config.policy.num_steps,
            num_actions=sizes.actions_per_sample,
            num_trained=sizes.trained_actions_per_sample,
            num_passes=update.num_passes,
            transitions_per_update=sizes.transitions_per_update // sizes.num_processes,
            num_updates=sizes.updates_per_iteration,
            pairs_per_update=real_images.batch_size // sizes.num_processes if real_images.weight > 0 else 0,
            recomputes_log_probs=update.recomputes_log_probs,
            num_image_sizes=max(1, len(run.config.model.sizes)),
        )
