"""The start model as a policy, for the KL term: what its network would have said of the states of a rollout.

    copy      a second set of weights on the device
    offload   the start weights wait in the CPU's memory and take the network's place for one pass a rollout
    adapters  the trained network itself without them, which needs no memory

Its outputs are computed once a rollout, before the updates, however many passes these make.
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
        """m (n, C, H, W) of the transitions `rows` (n,), flat indices b K + k."""
        return self.m[self.row_of[rows].to(self.m.device)]


@dataclass(frozen=True)
class StartModel:
    """policy: the start model's where `applied` is in force."""

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
