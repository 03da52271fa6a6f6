"""The start model as a policy, for the KL term: the network outputs that it gives for the states of a rollout.

    copy      a second set of weights on the device
    offload   the start weights lie in CPU memory and replace the network's weights for one pass per rollout
    adapters  the trained network without its adapters, which needs no extra memory

The outputs are computed once per rollout, before the updates, whatever the number of passes.
"""

# B samples, K actions, N transitions, N_i of image size i, C H W latent

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.trajectory import AnyTrajectory, Trajectory, by_size


@dataclass(frozen=True)
class StartOutputs:
    """The start model's network outputs for the chosen transitions of a rollout's samples of one image size."""

    m: Tensor  # (N, C, H, W) float32
    row_of: Tensor  # (B K,) int64 on the device of m, the row of m of each chosen transition

    def take(self, rows: Tensor) -> Tensor:
        """Returns m (n, C, H, W) of the transitions `rows` (n,), flat indices b K + k on the device."""
        return self.m[self.row_of[rows]]


@dataclass(frozen=True)
class StartModel:
    """The start model: inside `applied`, `policy` runs with the start weights."""

    policy: GaussianPolicy
    applied: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def outputs(self, trajectory: AnyTrajectory, rows: Tensor, micro_batch_size: int) -> dict[int, StartOutputs]:
        """Runs the start model on the transitions `rows` (N,); returns its outputs by image size."""
        outputs: dict[int, StartOutputs] = {}
        with self.applied():
            for size, of_size in by_size(trajectory, rows).items():
                part, inner = trajectory.part(size), trajectory.inner(rows[of_size])
                m = torch.cat([self._output(part, few) for few in inner.split(micro_batch_size)])
                row_of = torch.zeros(part.num_transitions, dtype=torch.int64)
                row_of[inner] = torch.arange(len(inner))
                outputs[size] = StartOutputs(m, row_of.to(m.device))
        return outputs

    def _output(self, trajectory: Trajectory, rows: Tensor) -> Tensor:
        taken = trajectory.transitions(rows)
        return self.policy.network_output(taken.x_t, taken.step, taken.conditioning)
