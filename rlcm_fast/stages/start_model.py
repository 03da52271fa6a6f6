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
from rlcm_fast.trajectory import AnyTrajectory, by_size


@dataclass(frozen=True)
class StartOutputs:
    """The start model's network outputs for the chosen transitions of a rollout."""

    m: list[Tensor]  # (N_i, C, H_i, W_i) float32, one for each image size
    size_of: Tensor  # (B K,) int64, the place in m of each chosen transition's size
    row_of: Tensor  # (B K,) int64, the row of each chosen transition there

    def take(self, rows: Tensor) -> Tensor:
        """Returns m (n, C, H, W) of the transitions `rows` (n,), flat indices b K + k of samples of one size."""
        m = self.m[int(self.size_of[rows[0]])]
        return m[self.row_of[rows].to(m.device)]


@dataclass(frozen=True)
class StartModel:
    """The start model: inside `applied`, `policy` runs with the start weights."""

    policy: GaussianPolicy
    applied: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def outputs(self, trajectory: AnyTrajectory, rows: Tensor, micro_batch_size: int) -> StartOutputs:
        """Runs the start model on the transitions `rows` (N,)."""
        outputs: list[Tensor] = []
        size_of, row_of = torch.zeros(2, trajectory.num_transitions, dtype=torch.int64)
        with self.applied():
            for size, places in enumerate(by_size(trajectory, rows)):
                of_size, parts = rows[places], []
                for part in of_size.split(micro_batch_size):
                    taken = trajectory.transitions(part)
                    parts.append(self.policy.network_output(taken.x_t, taken.step, taken.conditioning))
                outputs.append(torch.cat(parts))
                size_of[of_size], row_of[of_size] = size, torch.arange(len(of_size))
        return StartOutputs(outputs, size_of, row_of)
