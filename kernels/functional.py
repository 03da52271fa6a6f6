"""One documented function per op; each dispatches to an implementation (today: the plain torch of reference.py).

Everything that turns a network output into a state, a log-probability, a divergence or a loss goes through here, from
sampling as from training. Results are float32 whatever the inputs' dtype (float64 stays float64) and all ops are
differentiable by autograd.
"""

# N rows (samples or transitions), C H W latent; coef rows are A, B, sigma of x_s = A x_t + B m + sigma z

from __future__ import annotations

from torch import Tensor

from rlcm_fast.kernels import reference
from rlcm_fast.kernels.reference import RatioStats

__all__ = ["RatioStats", "clipped_ratio_loss", "gaussian_kl", "gaussian_log_prob", "gaussian_mean", "gaussian_step"]


def gaussian_mean(x: Tensor, m: Tensor, coef: Tensor) -> Tensor:
    """A x + B m, the mean of the next state, (N, C, H, W); x, m (N, C, H, W), coef (N, 3). sigma is not used."""
    return reference.gaussian_mean(x, m, coef)


def gaussian_log_prob(x: Tensor, m: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
    """The log-probability (N,) of x_next under N(A x + B m, sigma^2), mean over C, H, W, in nats per dimension.

    x, m, x_next (N, C, H, W); coef (N, 3) with sigma > 0 in every row (a row with sigma = 0 is no action, its
    log-probability is infinite or NaN; not checked, as that would wait for the device).
    """
    return reference.gaussian_log_prob(x, m, x_next, coef)


def gaussian_step(x: Tensor, m: Tensor, coef: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The next state A x + B m + sigma noise (N, C, H, W) and its log-probability (N,), mean over C, H, W.

    Rows with sigma = 0 give the mean and log-probability 0. The log-probability is that of the ROUNDED next state, by
    the same arithmetic as gaussian_log_prob, rather than -mean(noise^2)/2 - log sigma - log(2 pi)/2: the two differ by
    the rounding of x_next over sigma, and only the first makes the ratio of an unchanged network exactly one.
    """
    return reference.gaussian_step(x, m, coef, noise)


def gaussian_kl(m: Tensor, m_ref: Tensor, coef: Tensor) -> Tensor:
    """KL (N,) between two networks' actions in one state: mean over C, H, W of (B (m - m_ref))^2 / (2 sigma^2).

    m, m_ref (N, C, H, W); coef (N, 3), sigma > 0. Closed form, since both have the same sigma; nats per dimension.
    """
    return reference.gaussian_kl(m, m_ref, coef)


def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, RatioStats]:
    """PPO's clipped loss (), mean over rows of max(-a rho, -a clip(rho, 1 - clip_range, 1 + clip_range)), and stats.

    log_prob, log_prob_old, advantages (N,); rho = exp(log_prob - log_prob_old), the exponent clamped to +-20; a is the
    advantage clamped to +-advantage_clip. log_prob_old=None means on-policy: rho is exactly 1 with the gradient of
    log_prob. The gradient flows into log_prob only if the old one carries none, as is the rule.
    """
    return reference.clipped_ratio_loss(log_prob, log_prob_old, advantages, clip_range, advantage_clip)
