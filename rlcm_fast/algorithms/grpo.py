"""GRPO (arXiv 2402.03300): PPO's clipped loss on advantages within the images of one prompt.

    A = (r - mean_g) / std,         mean_g over the images of the prompt in this batch

So it wants `advantages.kind: group` (with `advantages.scale: group` for the paper's own std_g) or `leave_one_out`.
Departures: the KL term is the Gaussian step's closed form (update.kl_weight), where GRPO estimates it from samples; std
is the batch's unless asked otherwise, since a group of nearly equal rewards would be blown up (arXiv 2503.20783).
"""

from __future__ import annotations

from dataclasses import dataclass

from rlcm_fast.algorithms.ppo import PPO


@dataclass(frozen=True)
class GRPO(PPO):
    """PPO by another baseline; the checks of the config see to the advantages."""
