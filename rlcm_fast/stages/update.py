"""Trains on rollouts: what stays the same from one rollout to the next.

    for each pass:    the chosen transitions, shuffled and cut into `num_updates` equal parts (selection.py)
    for each part:    the algorithm's signals, and one optimizer step (rollout_updates.py)

Before the first update of a run, it measures how far rounding alone moves the ratio.
"""

# N transitions of an update on this process, B samples

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm
from rlcm_fast.config import UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.graphed_update import GraphedUpdate
from rlcm_fast.stages.kl_weight import KlWeight
from rlcm_fast.stages.rollout_updates import ExtraLoss, RolloutUpdates
from rlcm_fast.stages.selection import Selection
from rlcm_fast.stages.skipped_updates import SkippedUpdates
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update_metrics import UpdateMetrics
from rlcm_fast.trajectory import AnyTrajectory, by_size, micro_batches


@dataclass
class Updater:
    """Trains the network on rollouts; holds what stays the same from one rollout to the next."""

    policy: GaussianPolicy
    algorithm: Algorithm
    engine: Engine
    config: UpdateConfig
    start_model: StartModel | None = None
    real_images: ExtraLoss | None = None
    graphed: GraphedUpdate | None = None  # runs micro-batches by a graph
    guarded: InitVar[KlWeight | None] = None  # the KL term's weight, if a guard may move it
    may_lower: bool = False  # begins an update anew with smaller micro-batches if the device is out of memory
    say: Callable[[str], None] = say  # prints a line on the main process
    skipped: SkippedUpdates = field(init=False)  # goes on from rollout to rollout
    kl_weight: KlWeight = field(init=False)
    size: int = field(init=False)  # transitions of a micro-batch

    def __post_init__(self, guarded: KlWeight | None) -> None:
        self.kl_weight = guarded or KlWeight(self.config.kl_weight)
        self.size = self.config.micro_batch_size
        self.skipped = SkippedUpdates(self.config.max_skipped_updates, self.engine.skips_whole_updates, self.say)

    def update(
        self, trajectory: AnyTrajectory, sample_weights: Tensor, turn: Turn, may_stop: Callable[[], None] = lambda: None
    ) -> UpdateMetrics:
        """Trains on the chosen transitions `num_passes` times; sample_weights (B,) come from the algorithm.

        may_stop: is called before every micro-batch of the first update; stopping there loses nothing.

        Raises:
            Diverged: too many updates in a row had a gradient that is not finite, or weights have moved by one.
        """
        start, config = time.perf_counter(), self.config
        self.skipped.begin(turn)

        # Choose transitions, and run the start model on them if there is a KL term.
        selection = Selection(trajectory, config, self.algorithm.samples_together, turn.generator(Stream.UPDATE))
        if config.recomputes_log_probs:
            with stage("old_log_probs"):
                trajectory = self._recomputed(trajectory, selection.rows)
        work = RolloutUpdates(self, trajectory, sample_weights.to(self.policy.device), selection.rows, may_stop)

        # Take the optimizer steps.
        for _ in range(config.num_passes):
            for part in selection.one_pass():
                signals = work.signals(part.rows)  # (N,)
                work.train_on(part.rows[part.order], signals[part.order.to(signals.device)])
        if self.kl_weight.is_measured:
            self.kl_weight.divergence = parallel.mean(work.record.mean_kl()).item()
        return work.record.summary(time.perf_counter() - start)

    def check_ratio(self, trajectory: AnyTrajectory, turn: Turn, say: Callable[[str], None]) -> dict[str, float]:
        """Measures how far rounding alone moves the ratio from 1, and warns if the clip would act on that."""
        config = self.config
        generator = parallel.generator(turn.seed, Stream.RATIO_NOISE, parallel.rank())
        with stage("ratio_check"):
            noise = max(parallel.all_gather_list([self.ratio_noise(trajectory, generator)]))
        if noise >= config.clip_range and self.algorithm.clips and not config.is_on_policy:
            say(
                f"warning: rounding alone moves the ratio by {noise:.1e}, as much as update.clip_range="
                f"{config.clip_range}: clipping will act on noise; set update.old_log_probs=recompute or "
                "engine.dtype=fp32, or raise the clip range above the noise"
            )
        return {"ratio/noise_floor": noise}

    def ratio_noise(self, trajectory: AnyTrajectory, generator: torch.Generator) -> float:
        """Returns the largest |ratio - 1| of one shuffled micro-batch of each image size under unchanged weights."""
        noise = []
        for rows in by_size(trajectory, torch.arange(trajectory.num_transitions)).values():
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.config.micro_batch_size]]
            if self.config.old_log_probs == "recompute":
                trajectory = self._recomputed(trajectory, rows.flip(0))
            transitions = trajectory.transitions(rows)
            new = self.policy.log_prob(transitions).detach()  # with gradients, as in the update
            noise.append(torch.expm1(new - transitions.log_prob_old).abs().max().item())
        return max(noise)

    def can_lower(self, size: int, num_rows: int, num_extra: int) -> bool:
        """Tells whether an update of num_rows transitions may begin anew with less than `size` of them at once."""
        if not self.may_lower or size == 1:
            return False
        return self.engine.may_begin_again(-(-num_rows // (size // 2)) + num_extra)

    def lower(self, size: int) -> None:
        """Drops the gradients of an update and halves the size of its micro-batches, of which one had `size`."""
        self.engine.drop_gradients()
        if self.graphed:
            self.graphed.graphs.forget()
        if self.policy.device.type == "cuda":
            torch.cuda.empty_cache()
        self.size = size // 2
        self.say(
            f"an update's micro-batch of {size} transitions is out of memory; beginning the update anew with "
            f"{self.size} at once. A resumed run needs --update.micro_batch_size {self.size}, or what divides evenly"
        )

    def _recomputed(self, trajectory: AnyTrajectory, rows: Tensor) -> AnyTrajectory:
        """Recomputes the log-probs of `rows` (N,) under the present weights, in micro-batches of the update's size.

        Gradients are on but not used: without them torch.compile runs other graphs, which round differently.
        """
        log_probs = trajectory.log_probs.flatten()
        parts = [rows[places] for places in micro_batches(trajectory, rows, self.config.micro_batch_size)]
        new = torch.cat([self.policy.log_prob(trajectory.transitions(part)).detach() for part in parts])
        log_probs = log_probs.index_put((torch.cat(parts).to(log_probs.device),), new.to(log_probs))
        return trajectory.with_log_probs(log_probs.view_as(trajectory.log_probs))
