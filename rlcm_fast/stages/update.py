"""Takes the optimizer steps on a rollout: chosen transitions, micro-batches that mix steps, exact accumulation.

    for each pass:    the chosen transitions, shuffled and cut into `num_updates` equal parts (selection.py)
    for each part:    the algorithm's signals; transitions without a signal are left out
                      micro-batches -> log_prob -> loss (+ kl_weight * KL to the start model) -> backward
                      [micro-batches of real image-text pairs -> weight * their loss -> backward]; step

Each micro-batch is weighted by its share of the part, so the sum is the mean over the part, whatever the size of
micro-batches and whatever was left out: K micro-batches give the gradient of one. A micro-batch holds images of one
size. As log-probs are means over elements, an image weighs the same whatever its size.

An update that is out of memory before its step begins anew with micro-batches of half the size, if the size was `auto`
and the engine can do that (direct.py, on one process).

An update whose gradient is not finite moves nothing (engine/base.py); skipped_updates.py counts such updates and stops
the run.
"""

# N transitions of an update on this process, B samples

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm, Outputs
from rlcm_fast.config import UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.kernels import functional
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.graphed_update import GraphedUpdate, MicroBatch, RolloutTensors
from rlcm_fast.stages.kl_weight import KlWeight
from rlcm_fast.stages.selection import Selection, step_weights
from rlcm_fast.stages.skipped_updates import SkippedUpdates
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update_metrics import Record, UpdateMetrics
from rlcm_fast.trajectory import AnyTrajectory, Batch, batches, by_size, micro_batches


class ExtraLoss(Protocol):
    """A loss on other data that every update adds, in separate micro-batches."""

    num_micro_batches: int
    num_skipped: int  # pieces of the last batch that could not be read

    def read(self) -> None:
        """Reads the next batch, before anything of its update runs; raises a Fault on all processes together."""
        ...

    def losses(self) -> Iterator[Tensor]:
        """Yields num_micro_batches losses () that add up to the update's; go backward through each before the next."""
        ...


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
        work = _RolloutUpdates(self, trajectory, sample_weights.to(self.policy.device), selection.rows, may_stop)

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


class _RolloutUpdates:
    """The updates on one rollout and what they have recorded so far."""

    def __init__(
        self,
        updater: Updater,
        trajectory: AnyTrajectory,
        sample_weights: Tensor,
        rows: Tensor,
        may_stop: Callable[[], None],
    ) -> None:
        """rows (N,): all transitions that will be trained on."""
        config, policy = updater.config, updater.policy
        self.record = Record()
        self._updater = updater
        self._trajectory, self._sample_weights = trajectory, sample_weights
        self._may_stop = may_stop
        self._norm = 0.0  # of the gradient of the last update
        self._step_weights = step_weights(policy.schedule, config.step_weights).to(sample_weights.device)
        self._start_outputs = None
        if updater.start_model and updater.kl_weight.is_needed:
            with stage("start_model"):
                self._start_outputs = updater.start_model.outputs(trajectory, rows, config.micro_batch_size)
        self._tensors: RolloutTensors | None = None
        if updater.graphed:  # there is one image size
            self._tensors = RolloutTensors.of(trajectory.part(0), (self._start_outputs or {}).get(0))

    def signals(self, rows: Tensor) -> Tensor:
        """Returns the signals (N,) of an update's transitions."""
        num_actions = self._trajectory.num_actions
        weights = self._sample_weights[(rows // num_actions).to(self._sample_weights.device)]
        signals = self._updater.algorithm.signals(weights, lambda: self._change(rows, weights), num_actions)
        return signals * self._step_weights[(rows % num_actions).to(signals.device)]

    @torch.no_grad()
    def _change(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Returns how much each log-prob (N,) has grown since the rollout: by 0 before the first update."""
        if self.record.num_updates == 0:
            return torch.zeros_like(weights)
        policy, size = self._updater.policy, self._updater.config.micro_batch_size
        places = micro_batches(self._trajectory, rows, size)
        parts = (self._trajectory.transitions(rows[part]) for part in places)
        changes = torch.cat([policy.log_prob(part) - part.log_prob_old for part in parts])
        return changes[torch.cat(places).argsort().to(changes.device)]

    def train_on(self, rows: Tensor, signals: Tensor) -> None:
        """Takes one optimizer step on the transitions rows (N,) with signals (N,)."""
        updater = self._updater
        if updater.real_images:
            self._read(updater.real_images)
        num_extra = updater.real_images.num_micro_batches if updater.real_images else 0

        # Add up the gradients of all micro-batches and step; with smaller ones where these are out of memory.
        made = self._begun(rows, signals, num_extra)
        while not self._add_up(made, len(rows), num_extra):
            made = self._begun(rows, signals, num_extra)
        if updater.real_images:
            self._backward_extra(updater.real_images)
        if math.isfinite(self._norm):
            self.record.grad_norm = self._norm
            updater.skipped.taken()
        else:
            self.record.num_skipped += 1
            updater.skipped.skipped(self.record.not_finite(len(made), num_extra))
        self.record.update(num_chosen=len(rows), num_trained=sum(len(batch.rows) for batch in made))

    def _begun(self, rows: Tensor, signals: Tensor, num_extra: int) -> list[Batch]:
        """Begins an update and returns its micro-batches.

        Which transitions it trains on is copied to the device once; its micro-batches copy nothing.
        """
        made = batches(self._trajectory, rows, signals, self._micro_batches(rows, signals))
        self._updater.engine.begin_update(len(made) + num_extra)
        return made

    def _add_up(self, made: Sequence[Batch], num_rows: int, num_extra: int) -> bool:
        """Goes backward through all micro-batches; False if memory ran out: nothing is left of them then."""
        for done, batch in enumerate(made):
            if self.record.num_updates == 0:
                self._may_stop()
            try:
                self._backward(batch, len(batch.rows) / num_rows)
                is_done = True
            except torch.OutOfMemoryError:
                if not self._updater.can_lower(len(batch.rows), num_rows, num_extra):
                    raise
                is_done = False
            # The traceback, which holds the tensors of the pass, is gone here.
            if not is_done:
                self.record.forget_last(done)
                self._updater.lower(len(batch.rows))
                return False
            self._step()
        return True

    def _micro_batches(self, rows: Tensor, signals: Tensor) -> list[Tensor]:
        """Returns the places of the transitions to train on: those with a signal, and others to fill micro-batches.

        Every process has as many micro-batches of a size as the process that needs most, because passes may wait for
        each other.
        """
        # Train on all if each has a signal; the KL term is a signal of its own.
        size = self._updater.size
        if self._start_outputs is not None:
            return micro_batches(self._trajectory, rows, size)
        is_silent = (signals == 0).cpu()
        if not parallel.any_rank(bool(is_silent.any())):
            return micro_batches(self._trajectory, rows, size)

        # Count the micro-batches that each image size needs, on the process that needs most.
        of_sizes = list(by_size(self._trajectory, rows).values())
        needed = [-(-int((~is_silent[places]).sum()) // size) for places in of_sizes]
        most = torch.tensor(parallel.all_gather_list([needed])).amax(dim=0)  # (sizes,)
        most[0] = max(int(most[0]), int(most.sum() == 0))  # at least one

        # Fill them, transitions with a signal first.
        filled: list[Tensor] = []
        for places, count in zip(of_sizes, most.tolist(), strict=True):
            first = is_silent[places].to(torch.uint8).argsort(stable=True)[: count * size]
            filled += places[first].split(size) if count > 0 else ()
        return filled

    def _backward(self, batch: Batch, share: float) -> None:
        """Adds `share` of the mean loss of a micro-batch to the update's gradient."""
        policy, config = self._updater.policy, self._updater.config
        if self._updater.graphed and self._tensors:
            filled = MicroBatch.filled(batch.rows, batch.signals, share, self._updater.size)
            filled = filled.with_kl(self._updater.kl_weight.value)
            with stage("update_graph"):
                loss, kl, stats = self._updater.graphed(self._tensors, filled)
            self.record.micro_batch(stats, loss, kl)
            return
        with stage("update_forward"):
            transitions = self._trajectory.part(batch.size).transitions(batch.rows)
            m = policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
            coef = policy.coefficients(transitions.step)
            # With one update per rollout the old policy is the present one: its log-prob is the new one, detached.
            old = None if config.is_on_policy else transitions.log_prob_old
            outputs = Outputs(m, coef, share)
            loss, stats = self._updater.algorithm.loss_of_output(transitions, outputs, old, batch.signals)
            kl = m.new_zeros(())
            if self._start_outputs is not None:
                kl = functional.gaussian_kl(m, self._start_outputs[batch.size].take(batch.rows), coef).mean()
        with stage("update_backward"):
            self._updater.engine.backward(share * (loss + self._updater.kl_weight.value * kl))
        self.record.micro_batch(stats, loss.detach(), kl.detach())

    def _read(self, extra: ExtraLoss) -> None:
        start = time.perf_counter()
        extra.read()
        self.record.extra_seconds += time.perf_counter() - start

    def _backward_extra(self, extra: ExtraLoss) -> None:
        start = time.perf_counter()
        self.record.extra_skipped += extra.num_skipped
        for loss in extra.losses():
            with stage("update_backward"):
                self._updater.engine.backward(loss)
            self.record.extra_losses.append(loss.detach())
            self._step()
        self.record.extra_seconds += time.perf_counter() - start

    def _step(self) -> None:
        with stage("step"):
            norm = self._updater.engine.step()
        if norm is not None:
            self._norm = norm
