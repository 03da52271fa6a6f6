"""The start model as a policy, for the KL term: the network outputs that it gives for the states of a rollout.

    copy      a second set of weights on the device
    offload   the start weights lie in CPU memory and replace the network's weights for one pass per rollout
    adapters  the trained network without its adapters, which needs no extra memory

The outputs are computed once per rollout, before the updates, whatever the number of passes.
"""

# B samples, K actions, N transitions, C H W latent

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.trajectory import Trajectory


@dataclass(frozen=True)
class StartOutputs:
    """The start model's network outputs for the chosen transitions of a rollout."""

    m: Tensor  # (N, C, H, W) float32
    row_of: Tensor  # (B K,) int64, the row of m of each chosen transition

    def take(self, rows: Tensor) -> Tensor:
        """Returns m (n, C, H, W) of the transitions `rows` (n,), flat indices b K + k."""
        return self.m[self.row_of[rows].to(self.m.device)]


@dataclass(frozen=True)
class StartModel:
    """The start model: inside `applied`, `policy` runs with the start weights."""

    policy: GaussianPolicy
    applied: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def outputs(self, trajectory: Trajectory, rows: Tensor, micro_batch_size: int) -> StartOutputs:
        """Runs the start model on the transitions `rows` (N,)."""
        parts = []
        with self.applied():
            for part in rows.split(micro_batch_size):
                transitions = trajectory.transitions(part)
                parts.append(self.policy.network_output(transitions.x_t, transitions.step, transitions.conditioning))
        row_of = torch.zeros(trajectory.num_transitions, dtype=torch.int64)
        row_of[rows] = torch.arange(len(rows))
        return StartOutputs(torch.cat(parts), row_of)
