"""Runs the micro-batches of updates by one graph: gather the rows, the network, the loss, the backward pass.

The graph reads rows, signals and the rollout from fixed tensors and adds to gradients that keep their addresses. The
step, and the average over processes, run after it as ever. All micro-batches have one size: the last one of an update
is filled up with rows of signal 0, whose gradient is zero. They repeat rows of the micro-batch, so the statistics of
the ratio are over its own transitions, some of them counted twice.
"""

# B samples, K actions, n rows of a micro-batch, r <= n of them real

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcm_fast.algorithms import Algorithm, Outputs
from rlcm_fast.config import UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.graphs import Graphs, Work
from rlcm_fast.kernels import functional
from rlcm_fast.kernels.functional import RatioStats
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.stages.start_model import StartOutputs
from rlcm_fast.trajectory import Trajectory


@dataclass(frozen=True)
class RolloutTensors:
    """What all micro-batches of a rollout's updates read; shapes do not depend on which prompts were drawn."""

    trajectory: Trajectory
    start_outputs: StartOutputs | None

    @classmethod
    def of(cls, trajectory: Trajectory, start_outputs: StartOutputs | None) -> RolloutTensors:
        by_sample = trajectory.conditioning.by_sample()
        return cls(replace(trajectory, conditioning=by_sample), start_outputs)


@dataclass(frozen=True)
class MicroBatch:
    """The rows of one micro-batch."""

    rows: Tensor  # (n,) int64, flat indices b K + k
    signals: Tensor  # (n,) float32
    is_real: Tensor  # (n,) float32, 1 or 0
    share: Tensor  # () float32, r / all rows of the update
    kl_weight: Tensor  # () float32
    expected_share: float  # the same on the host; a graph keeps that of its first micro-batch, for speed alone

    @classmethod
    def filled(cls, rows: Tensor, signals: Tensor, share: float, size: int) -> MicroBatch:
        """Fills rows (r,) and signals (r,) up to `size` on their device; the KL term has weight 0."""
        device = signals.device
        places = torch.arange(size, device=device)
        is_real = (places < len(rows)).float()
        repeated = places % len(rows)
        filled = signals[repeated].float().masked_fill(places >= len(rows), 0.0)
        share_there, kl_weight = (torch.full((), number, device=device) for number in (share, 0.0))
        return cls(rows[repeated], filled, is_real, share_there, kl_weight, share)

    def with_kl(self, weight: float) -> MicroBatch:
        """Returns the micro-batch with another weight of the KL term."""
        return replace(self, kl_weight=torch.full_like(self.kl_weight, weight))


@dataclass(frozen=True)
class GraphedUpdate:
    """Adds micro-batches to the engine's gradients; built once for a run."""

    graphs: Graphs
    policy: GaussianPolicy
    algorithm: Algorithm
    engine: Engine
    config: UpdateConfig
    gradients: Mapping[Tensor, Tensor]  # by their weights; the engine holds them

    def __call__(self, rollout: RolloutTensors, batch: MicroBatch) -> tuple[Tensor, Tensor, RatioStats]:
        """Adds `share` of a micro-batch's mean loss; returns the loss (), the KL divergence () and the statistics."""
        # The first recording of a shape needs gradients of zero: an update's micro-batches all have the same shape.
        work = Work("update", self._backward, fixed=self._fixed, reset=self._zero, effects=self._sums)
        found = self.graphs(work, rollout, batch)
        self.engine.note_backward()
        return found

    def _backward(self, rollout: RolloutTensors, batch: MicroBatch) -> tuple[Tensor, Tensor, RatioStats]:
        # Run the network on the rows.
        policy, config = self.policy, self.config
        transitions = rollout.trajectory.transitions(batch.rows)
        m = policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
        coef = policy.coefficients(transitions.step)

        # The mean is over the real rows.
        old = None if config.is_on_policy else transitions.log_prob_old
        outputs = Outputs(m, coef, batch.expected_share)
        loss, stats = self.algorithm.loss_of_output(transitions, outputs, old, batch.signals)
        num_real = batch.is_real.sum()
        loss = loss * (len(batch.rows) / num_real)
        kl = m.new_zeros(())
        if rollout.start_outputs is not None:
            divergence = functional.gaussian_kl(m, rollout.start_outputs.take(batch.rows), coef)
            kl = (divergence * batch.is_real).sum() / num_real
        self.engine.differentiate(batch.share * (loss + batch.kl_weight * kl))
        return loss.detach(), kl.detach(), stats

    def _sums(self) -> list[Tensor]:
        return list(self.gradients.values())

    def _fixed(self) -> list[Tensor]:
        return [*self.gradients, *self._sums()]

    def _zero(self) -> None:
        torch._foreach_zero_(self._sums())
