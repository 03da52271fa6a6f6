"""Takes the optimizer steps on one rollout: micro-batches that mix steps, exact accumulation.

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
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Outputs
from rlcm_fast.kernels import functional
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.stages.graphed_update import GatheredRows, MicroBatch, filled_sizes
from rlcm_fast.stages.selection import step_weights
from rlcm_fast.stages.update_metrics import Record
from rlcm_fast.trajectory import AnyTrajectory, Batch, batches, by_size, micro_batches

if TYPE_CHECKING:
    from rlcm_fast.stages.update import Updater


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


class RolloutUpdates:
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
        self._filled_sizes: dict[int, int] = {}  # rows of a graph's micro-batches in an update, by image size
        self._step_weights = step_weights(policy.schedule, config.step_weights).to(sample_weights.device)
        self._start_outputs = None
        if updater.start_model and updater.kl_weight.is_needed:
            with stage("start_model"):
                self._start_outputs = updater.start_model.outputs(trajectory, rows, config.micro_batch_size)

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
        self._filled_sizes = filled_sizes(made, self._updater.size) if self._updater.graphed else {}
        return made

    def _add_up(self, made: Sequence[Batch], num_rows: int, num_extra: int) -> bool:
        """Goes backward through all micro-batches; False if memory ran out: nothing is left of them then."""
        for done, batch in enumerate(made):
            if self.record.num_updates == 0:
                self._may_stop()
            size = max(self._filled_sizes.values(), default=len(batch.rows))
            try:
                if done == 0:
                    self._record_graphs(made, num_rows)
                self._backward(batch, len(batch.rows) / num_rows)
                is_done = True
            except torch.OutOfMemoryError:
                if not self._updater.can_lower(size, num_rows, num_extra):
                    raise
                is_done = False
            # The traceback, which holds the tensors of the pass, is gone here.
            if not is_done:
                self.record.forget_last(done)
                self._updater.lower(size)
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
        if self._updater.graphed:
            with stage("update_graph"):
                loss, kl, stats = self._updater.graphed(*self._filled(batch, share))
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

    def _record_graphs(self, made: Sequence[Batch], num_rows: int) -> None:
        """Records the graph of each image size that has none yet; call it before the update adds anything."""
        if self._updater.graphed:
            for batch in {batch.size: batch for batch in reversed(made)}.values():
                with stage("update_graph"):
                    self._updater.graphed.record(*self._filled(batch, len(batch.rows) / num_rows))

    def _filled(self, batch: Batch, share: float) -> tuple[GatheredRows, MicroBatch]:
        """Returns a micro-batch filled up with rows, so that it has the shape of a graph."""
        filled = MicroBatch.filled(batch.rows, batch.signals, share, self._filled_sizes[batch.size])
        start_outputs = self._start_outputs[batch.size] if self._start_outputs else None
        gathered = GatheredRows.of(self._trajectory.part(batch.size), start_outputs, filled.rows)
        return gathered, filled.with_kl(self._updater.kl_weight.value)

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
