"""Runs the micro-batches of updates by graphs: the network, the loss, the backward pass; one graph for each image size.

A graph reads a micro-batch from fixed tensors and adds to gradients that keep their addresses. The step, and the
average over processes, run after it as ever. The rows are gathered before it, so its shapes depend on neither the
number of samples nor the prompts of a rollout: one graph serves all rollouts.

All micro-batches of an image size have as many rows: the last one of an update is filled up with rows of signal 0,
whose gradient is zero. They repeat rows of the micro-batch, so the statistics of the ratio are over its own
transitions, some of them counted twice.

A graph is recorded before its update has added anything to the gradients, because recording makes them zero.
"""

# B samples, K actions, n rows of a micro-batch, r <= n of them real, C H W latent

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from rlcm_fast.trajectory import Batch, Trajectory, Transitions


def filled_sizes(made: Sequence[Batch], most: int) -> dict[int, int]:
    """Returns how many rows each image size's micro-batches of an update are filled up to.

    That is `most`, unless all of them are smaller: then it is the largest, rounded up to an eighth of `most`, because a
    size's share of the prompts differs by one from rollout to rollout, and each number of rows has a graph.
    """
    eighth = max(1, most // 8)
    largest: dict[int, int] = {}
    for batch in made:
        largest[batch.size] = max(largest.get(batch.size, 0), len(batch.rows))
    return {size: min(most, -(-rows // eighth) * eighth) for size, rows in largest.items()}


@dataclass(frozen=True)
class GatheredRows:
    """What the network and the loss read of the rows of a micro-batch."""

    transitions: Transitions  # n of them; the conditioning has a text for each
    m_start: Tensor | None  # (n, C, H, W) float32, the start model's outputs, if there is a KL term

    @classmethod
    def of(cls, part: Trajectory, start_outputs: StartOutputs | None, rows: Tensor) -> GatheredRows:
        """Gathers rows (n,), flat indices b K + k, of the samples of one image size."""
        transitions = part.transitions(rows)
        transitions = replace(transitions, conditioning=transitions.conditioning.by_sample())
        return cls(transitions, start_outputs.take(rows) if start_outputs else None)


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

    def record(self, gathered: GatheredRows, batch: MicroBatch) -> None:
        """Records the graph of such micro-batches if there is none yet; gradients must be zero, and are afterwards."""
        self.graphs.record(self._work(), gathered, batch)

    def __call__(self, gathered: GatheredRows, batch: MicroBatch) -> tuple[Tensor, Tensor, RatioStats]:
        """Adds `share` of a micro-batch's mean loss; returns the loss (), the KL divergence () and the statistics.

        Micro-batches without a graph run as they are.
        """
        found = self.graphs(self._work(), gathered, batch)
        self.engine.note_backward()
        return found

    def _work(self) -> Work:
        return Work("update", self._backward, fixed=self._fixed, sums=self.gradients.values)

    def _backward(self, gathered: GatheredRows, batch: MicroBatch) -> tuple[Tensor, Tensor, RatioStats]:
        # Run the network on the rows.
        policy, config, transitions = self.policy, self.config, gathered.transitions
        m = policy.network_output(transitions.x_t, transitions.step, transitions.conditioning)
        coef = policy.coefficients(transitions.step)

        # The mean is over the real rows.
        old = None if config.is_on_policy else transitions.log_prob_old
        outputs = Outputs(m, coef, batch.expected_share)
        loss, stats = self.algorithm.loss_of_output(transitions, outputs, old, batch.signals)
        num_real = batch.is_real.sum()
        loss = loss * (len(batch.rows) / num_real)
        kl = m.new_zeros(())
        if gathered.m_start is not None:
            divergence = functional.gaussian_kl(m, gathered.m_start, coef)
            kl = (divergence * batch.is_real).sum() / num_real
        self.engine.differentiate(batch.share * (loss + batch.kl_weight * kl))
        return loss.detach(), kl.detach(), stats

    def _fixed(self) -> list[Tensor]:
        return [*self.gradients, *self.gradients.values()]
