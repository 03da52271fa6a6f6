"""Every op in plain torch on one page: the specification that faster kernels are tested against.

A policy step is affine and Gaussian: x_s = A x_t + B m + sigma z with z ~ N(0, I), so that the log-probability of an
action, as the MEAN over C, H, W of independent normal densities, is

    log p(x_s | x_t) = -mean(r^2) / 2 - log sigma - log(2 pi) / 2,     r = (x_s - A x_t - B m) / sigma

Arithmetic and results are float32 for inputs of lower precision; float64 inputs stay float64 (for gradcheck).
"""

# N rows (samples or transitions), C H W latent; coef rows are A, B, sigma

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
_MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any clip range, far inside float32


@dataclass(frozen=True)
class RatioStats:
    """How far the policy has moved from the one that acted; detached, never read on the host here."""

    ratio_mean: Tensor  # ()
    ratio_max_deviation: Tensor  # (), max |ratio - 1|
    clip_fraction: Tensor  # () in [0, 1], share of rows with |ratio - 1| above clip_range
    approx_kl: Tensor  # (), mean(ratio - 1 - log ratio), never negative (Schulman's estimator k3)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _column(coef: Tensor, i: int) -> Tensor:
    return _wide(coef)[:, i].view(-1, 1, 1, 1)


def gaussian_mean(x: Tensor, m: Tensor, coef: Tensor) -> Tensor:
    return _column(coef, 0) * _wide(x) + _column(coef, 1) * _wide(m)


def _log_prob_given_mean(mean: Tensor, x_next: Tensor, sigma: Tensor) -> Tensor:
    """(N,) from sigma (N,) > 0. Shared by the rollout and the training so that both round alike."""
    r = (_wide(x_next) - mean) / sigma.view(-1, 1, 1, 1)
    return -0.5 * r.square().mean(dim=(1, 2, 3)) - sigma.log() - _HALF_LOG_TWO_PI


def gaussian_log_prob(x: Tensor, m: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
    return _log_prob_given_mean(gaussian_mean(x, m, coef), x_next, _wide(coef)[:, 2])


def gaussian_step(x: Tensor, m: Tensor, coef: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, sigma = gaussian_mean(x, m, coef), _wide(coef)[:, 2]
    x_next = mean + sigma.view(-1, 1, 1, 1) * _wide(noise)
    is_action = sigma > 0
    log_prob = _log_prob_given_mean(mean, x_next, torch.where(is_action, sigma, 1.0))
    return x_next, torch.where(is_action, log_prob, 0.0)


def gaussian_kl(m: Tensor, m_ref: Tensor, coef: Tensor) -> Tensor:
    b, sigma = _column(coef, 1), _column(coef, 2)
    return 0.5 * (b / sigma * (_wide(m) - _wide(m_ref))).square().mean(dim=(1, 2, 3))


def _stats(log_ratio: Tensor, clip_range: float) -> RatioStats:
    # expm1: in float32 exp(d) - 1 - d is all rounding below |d| = 3e-4, which is where these ratios live
    deviation = torch.expm1(log_ratio)
    return RatioStats(
        ratio_mean=1.0 + deviation.mean(),
        ratio_max_deviation=deviation.abs().max(),
        clip_fraction=(deviation.abs() > clip_range).to(deviation.dtype).mean(),
        approx_kl=(deviation - log_ratio).mean(),
    )


def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, RatioStats]:
    log_prob = _wide(log_prob)
    old = log_prob.detach() if log_prob_old is None else _wide(log_prob_old)
    log_ratio = (log_prob - old).clamp(-_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    gain = _wide(advantages).clamp(-advantage_clip, advantage_clip)
    clipped = ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    loss = torch.maximum(-gain * ratio, -gain * clipped).mean()
    return loss, _stats(log_ratio.detach(), clip_range)
