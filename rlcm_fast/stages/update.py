"""The optimizer steps on a rollout: chosen transitions, micro-batches that mix steps, exact accumulation.

    for each pass:    the chosen transitions, shuffled and cut into `num_updates` equal parts (selection.py)
    for each part:    signals of the algorithm; transitions without a signal are left out
                      micro-batches -> log_prob -> loss (+ kl_weight * KL to the start model) -> backward
                      [micro-batches of real image-text pairs -> weight * pretraining loss -> backward]; step

What a micro-batch adds is weighted by its share of the part, so the sum is the mean over the part, whatever the size of
micro-batches and whatever was left out: K micro-batches give the gradient of one.
"""

# N transitions of an update on this process, B samples

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import Algorithm
from rlcm_fast.config import UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.stages.selection import Selection, step_weights
from rlcm_fast.stages.start_model import Reference
from rlcm_fast.trajectory import Trajectory


class ExtraLoss(Protocol):
    """A loss of other data that every update adds, in micro-batches of its own."""

    num_micro_batches: int

    def losses(self) -> Iterator[Tensor]:
        """num_micro_batches times a loss () whose sum is the update's, to go backward through before the next."""
        ...


@dataclass(frozen=True)
class UpdateMetrics:
    """Over all micro-batches of a round on this process; tensors are 0-d, so reading them is the only sync."""

    ratio_mean: Tensor
    ratio_max_deviation: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    loss: Tensor
    kl_to_start: Tensor  # 0 where update.kl_weight is 0
    skipped: float  # share of the chosen transitions that had no signal, so the network was not run for them
    pretraining_loss: float | None  # mean over updates, weighted; None where there is none
    grad_norm: float  # of the last update, before clipping, over all processes
    seconds: float
    pretraining_seconds: float  # the part of `seconds` spent on the extra loss

    def metrics(self, advantages: Tensor) -> dict[str, float]:
        """Means over all processes, and the largest deviation of any; advantages (B,) are this process's."""
        means = {
            "advantage/abs_mean": advantages.abs().mean().to(self.loss.device),
            "ratio/mean": self.ratio_mean,
            "clip_fraction": self.clip_fraction,
            "approx_kl": self.approx_kl,
            "loss": self.loss,
            "kl_to_start": self.kl_to_start,
            "skipped_transitions": self.loss.new_tensor(self.skipped),
        }
        if self.pretraining_loss is not None:
            means["pretraining/loss"] = self.loss.new_tensor(self.pretraining_loss)
        averaged = parallel.all_gather(torch.stack(list(means.values()))[None]).mean(dim=0).tolist()
        deviation = parallel.all_gather(self.ratio_max_deviation[None]).max().item()
        return {
            **dict(zip(means, averaged, strict=True)),
            "ratio/max_deviation": deviation,
            "grad_norm": self.grad_norm,
        }


def update(
    policy: GaussianPolicy,
    algorithm: Algorithm,
    trajectory: Trajectory,
    weights: Tensor,
    engine: Engine,
    config: UpdateConfig,
    generator: torch.Generator,
    reference: Reference | None = None,
    extra: ExtraLoss | None = None,
    before_first_step: Callable[[], None] = lambda: None,
) -> UpdateMetrics:
    """Trains on the chosen transitions `num_passes` times; weights (B,): the algorithm's, of this process's samples.

    `before_first_step` is called before every micro-batch of the first update, where stopping loses nothing.
    """
    start = time.perf_counter()
    selection = Selection(trajectory.num_samples, trajectory.num_actions, config, algorithm.is_of_pairs, generator)
    if config.recomputes_log_probs:
        trajectory = recomputed(policy, trajectory, selection.rows, config.micro_batch_size)
    work = _Work(policy, algorithm, trajectory, weights, engine, config, reference, extra, before_first_step)
    work.look_up_reference(selection.rows)
    for _ in range(config.num_passes):
        for rows in selection.one_pass():
            signals = work.signals(rows)
            if algorithm.is_of_pairs:
                order = selection.shuffled(len(rows))
                rows, signals = rows[order], signals[order.to(signals.device)]
            work.train_on(rows, signals)
    return work.summary(time.perf_counter() - start)


def recomputed(policy: GaussianPolicy, trajectory: Trajectory, rows: Tensor, micro_batch_size: int) -> Trajectory:
    """The trajectory with the log-probs of `rows` (N,) under the present weights, in micro-batches of that size.

    Gradients are on, and not used: torch.compile has other graphs without them, which round otherwise.
    """
    log_probs = trajectory.log_probs.flatten()
    parts = rows.split(micro_batch_size)
    new = torch.cat([policy.log_prob(trajectory.transitions(part)).detach() for part in parts])
    log_probs = log_probs.index_put((rows.to(log_probs.device),), new.to(log_probs))
    return replace(trajectory, log_probs=log_probs.view_as(trajectory.log_probs))


def ratio_noise(
    policy: GaussianPolicy, trajectory: Trajectory, config: UpdateConfig, generator: torch.Generator
) -> float:
    """Largest |ratio - 1| of one shuffled micro-batch under unchanged weights: what rounding alone does to ratios."""
    rows = torch.randperm(trajectory.num_transitions, generator=generator)[: config.micro_batch_size]
    if config.old_log_probs == "recompute":
        trajectory = recomputed(policy, trajectory, rows.flip(0), config.micro_batch_size)
    transitions = trajectory.transitions(rows)
    new = policy.log_prob(transitions).detach()  # with gradients, as the update has it
    return torch.expm1(new - transitions.log_prob_old).abs().max().item()


@dataclass
class _Work:
    """The updates of one rollout, and what they have recorded so far."""

    policy: GaussianPolicy
    algorithm: Algorithm
    trajectory: Trajectory
    weights: Tensor  # (B,)
    engine: Engine
    config: UpdateConfig
    reference: Reference | None
    extra: ExtraLoss | None
    before_first_step: Callable[[], None]

    def __post_init__(self) -> None:
        self.records: list[tuple[RatioStats, Tensor, Tensor]] = []
        self.extra_losses: list[Tensor] = []
        self.num_updates, self.num_chosen, self.num_trained = 0, 0, 0
        self.grad_norm = self.extra_seconds = 0.0
        self.step_weights = step_weights(self.policy.schedule, self.config.step_weights).to(self.weights.device)

    def look_up_reference(self, rows: Tensor) -> None:
        """Of every chosen transition, what the start model says of its state."""
        if self.reference is None:
            return
        self.m_ref = self.reference.outputs(self.trajectory, rows, self.config.micro_batch_size)
        self.places = torch.zeros(self.trajectory.num_transitions, dtype=torch.int64)
        self.places[rows] = torch.arange(len(rows))

    def signals(self, rows: Tensor) -> Tensor:
        """(N,) of an update's transitions; an algorithm of pairs is told how their log-probs have changed."""
        num_actions = self.trajectory.num_actions
        weights = self.weights[(rows // num_actions).to(self.weights.device)]
        change = self._change(rows) if self.algorithm.is_of_pairs and self.num_updates > 0 else None
        signals = self.algorithm.signals(weights, change, num_actions)
        return signals * self.step_weights[(rows % num_actions).to(signals.device)]

    @torch.no_grad()
    def _change(self, rows: Tensor) -> Tensor:
        parts = (self.trajectory.transitions(part) for part in rows.split(self.config.micro_batch_size))
        return torch.cat([self.policy.log_prob(part) - part.log_prob_old for part in parts])

    def train_on(self, rows: Tensor, signals: Tensor) -> None:
        """One update on the transitions rows (N,) with signals (N,)."""
        kept = self._kept(signals)
        micro_batches = kept.split(self.config.micro_batch_size)
        num_extra = self.extra.num_micro_batches if self.extra else 0
        self.engine.begin_update(len(micro_batches) + num_extra)
        for places in micro_batches:
            if self.num_updates == 0:
                self.before_first_step()
            self._backward(rows[places], signals[places.to(signals.device)], len(places) / len(rows))
        if self.extra:
            self._backward_extra(self.extra)
        self.num_updates += 1
        self.num_chosen, self.num_trained = self.num_chosen + len(rows), self.num_trained + len(kept)

    def _kept(self, signals: Tensor) -> Tensor:
        """Places of the transitions to train on: those with a signal, and others until micro-batches are full.

        As many micro-batches on every process as the one with most needs, since their passes may wait for each other.
        """
        if self.reference is not None:  # the KL term is a signal of its own
            return torch.arange(len(signals))
        is_silent = (signals == 0).cpu()
        if not parallel.any_rank(bool(is_silent.any())):
            return torch.arange(len(signals))
        size = self.config.micro_batch_size
        num_needed = max(1, -(-int((~is_silent).sum()) // size))
        num_micro_batches = max(parallel.all_gather_list([num_needed]))
        return is_silent.to(torch.uint8).argsort(stable=True)[: num_micro_batches * size]

    def _backward(self, rows: Tensor, signals: Tensor, share: float) -> None:
        """Adds `share` of the mean loss of a micro-batch to the update's gradient."""
        transitions = self.trajectory.transitions(rows)
        m = self.policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
        coef = self.policy.coefficients(transitions.step)
        # With one update a rollout the old policy is the present one: its log-prob is the new one's, detached (exact).
        old = None if self.config.is_on_policy else transitions.log_prob_old
        loss, stats = self.algorithm.loss_of_output(transitions.x_t, m, transitions.x_s, coef, old, signals)
        kl = m.new_zeros(())
        if self.reference is not None:
            m_ref = self.m_ref[self.places[rows].to(self.m_ref.device)]
            kl = functional.gaussian_kl(m, m_ref, coef).mean()
        self.engine.backward(share * (loss + self.config.kl_weight * kl))
        self.records.append((stats, loss.detach(), kl.detach()))
        self._step()

    def _backward_extra(self, extra: ExtraLoss) -> None:
        start = time.perf_counter()
        for loss in extra.losses():
            self.engine.backward(loss)
            self.extra_losses.append(loss.detach())
            self._step()
        self.extra_seconds += time.perf_counter() - start

    def _step(self) -> None:
        norm = self.engine.step()
        if norm is not None:
            self.grad_norm = norm

    def summary(self, seconds: float) -> UpdateMetrics:
        stats = [record[0] for record in self.records]
        extra = torch.stack(self.extra_losses).sum().item() / self.num_updates if self.extra_losses else None
        return UpdateMetrics(
            ratio_mean=torch.stack([s.ratio_mean for s in stats]).mean(),
            ratio_max_deviation=torch.stack([s.ratio_max_deviation for s in stats]).max(),
            clip_fraction=torch.stack([s.clip_fraction for s in stats]).mean(),
            approx_kl=torch.stack([s.approx_kl for s in stats]).mean(),
            loss=torch.stack([record[1] for record in self.records]).mean(),
            kl_to_start=torch.stack([record[2] for record in self.records]).mean(),
            skipped=1 - self.num_trained / self.num_chosen,
            pretraining_loss=extra,
            grad_norm=self.grad_norm,
            seconds=seconds,
            pretraining_seconds=self.extra_seconds,
        )
