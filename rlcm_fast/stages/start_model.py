"""The start model as a policy, for the KL term: what its network would have said of the states of a rollout.

    copy      a second set of weights on the device
    offload   the start weights wait in the CPU's memory and take the network's place for one pass a rollout
    adapters  the trained network itself without them, which needs no memory

Its outputs are computed once a rollout, before the updates, however many passes these make.
"""

# N transitions, C H W latent

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast.config import EmaConfig
from rlcm_fast.engine.averaging import WeightAverage
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.trajectory import Trajectory


@dataclass(frozen=True)
class Reference:
    """policy: of the start model where `applied` is in force."""

    policy: GaussianPolicy
    applied: Callable[[], AbstractContextManager[None]] = nullcontext

    @torch.no_grad()
    def outputs(self, trajectory: Trajectory, rows: Tensor, micro_batch_size: int) -> Tensor:
        """m (N, C, H, W) float32 of the transitions `rows` (N,), in their order."""
        parts = []
        with self.applied():
            for part in rows.split(micro_batch_size):
                transitions = trajectory.transitions(part)
                parts.append(self.policy.network_output(transitions.x_t, transitions.step, transitions.conditioning))
        return torch.cat(parts)


def build_reference(
    start: Any, policy_of: Callable[[Any], GaussianPolicy], policy: GaussianPolicy, network: nn.Module
) -> Reference:
    """start: of `start_network`, before anything was trained; where it is `network` itself, its weights are parked."""
    if start is not network:
        return Reference(policy_of(start))
    parked = WeightAverage(network, EmaConfig(device="cpu"))  # an average of one set of weights: themselves
    return Reference(policy, parked.applied)
