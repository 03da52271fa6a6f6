"""DPOK (arXiv 2305.16381, equation 9): the policy gradient with a KL divergence to the start model at every step.

    loss = alpha * (PPO's clipped loss) + beta * mean over transitions of KL( p(x_s | x_t) || p_start(x_s | x_t) )

The steps have equal sigmas, so the KL is a squared difference of means over 2 sigma^2, in closed form and not sampled.
Only beta / alpha matters to Adam: it is update.kl_weight, and has to be above 0. The paper's is .01 / 10, so 1e-3 here:
log-prob and KL are both sums over C, H, W there and both means here, and the factor between sum and mean cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlcm_fast.algorithms.ppo import PPO


@dataclass(frozen=True)
class DPOK(PPO):
    """PPO with the KL term switched on; the checks of the config see to that."""
