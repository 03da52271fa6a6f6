"""Every op in plain torch on one page: the specification that faster kernels are tested against.

A policy step is affine and Gaussian: x_s = A x_t + B m + sigma z with z ~ N(0, I). The log-probability of an action is
the MEAN over C, H, W of the log-densities of independent normal distributions:

    log p(x_s | x_t) = -mean(r^2) / 2 - log sigma - log(2 pi) / 2,     r = (x_s - A x_t - B m) (1 / sigma)

Inputs of lower precision give float32 arithmetic and results; float64 inputs stay float64 (for gradcheck). Only
group_norm_silu computes in the dtype of x, and so returns the same bits as the layers of an unpatched model.
"""

# N rows (samples or transitions), C H W latent; coef rows are A, B, sigma

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)
_MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: far outside any clip range, far inside float32


@dataclass(frozen=True)
class RatioStats:
    """Distance between the policy and the policy that acted; detached, and never read on the host here."""

    ratio_mean: Tensor  # ()
    ratio_max_deviation: Tensor  # (), max |ratio - 1|
    clip_fraction_above: Tensor  # () in [0, 1], share of rows with ratio - 1 above clip_range
    clip_fraction_below: Tensor  # () in [0, 1], share of rows with 1 - ratio above clip_range
    mean_kl: Tensor  # (), mean(-log ratio): unbiased, of any sign (Schulman's estimator k1)
    approx_kl: Tensor  # (), mean(ratio - 1 - log ratio), never negative (his k3)

    @property
    def clip_fraction(self) -> Tensor:
        """() in [0, 1], share of rows with |ratio - 1| above clip_range."""
        return self.clip_fraction_above + self.clip_fraction_below


def _wide(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _column(coef: Tensor, i: int) -> Tensor:
    return _wide(coef)[:, i].view(-1, 1, 1, 1)


def gaussian_mean(x: Tensor, m: Tensor, coef: Tensor) -> Tensor:
    return _column(coef, 0) * _wide(x) + _column(coef, 1) * _wide(m)


def _log_prob_given_mean(mean: Tensor, x_next: Tensor, sigma: Tensor) -> Tensor:
    """Log-probability (N,) for sigma (N,) > 0. Rollout and training share this function, so both round alike.

    1 / sigma is rounded once per row, as in the kernels, where dividing each element would cost more than the rest.
    """
    r = (_wide(x_next) - mean) * sigma.reciprocal().view(-1, 1, 1, 1)
    return -0.5 * r.square().mean(dim=(1, 2, 3)) - sigma.log() - _HALF_LOG_TWO_PI


def guided(m: Tensor, m_uncond: Tensor, guidance_scale: float) -> Tensor:
    uncond = _wide(m_uncond)
    return uncond + guidance_scale * (_wide(m) - uncond)


def gaussian_log_prob(x: Tensor, m: Tensor, x_next: Tensor, coef: Tensor) -> Tensor:
    return _log_prob_given_mean(gaussian_mean(x, m, coef), x_next, _wide(coef)[:, 2])


def gaussian_step(x: Tensor, m: Tensor, coef: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    mean, sigma = gaussian_mean(x, m, coef), _wide(coef)[:, 2]
    x_next = mean + sigma.view(-1, 1, 1, 1) * _wide(noise)
    is_action = sigma > 0
    log_prob = _log_prob_given_mean(mean, x_next, torch.where(is_action, sigma, 1.0))
    return x_next, torch.where(is_action, log_prob, 0.0)


def philox_normal(seeds: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal numbers (N, *shape) float32, by Philox4x32-10 (Salmon et al. 2011) of (seed, place in the row).

    seeds (N,) int64. Box-Muller turns the first two words into one number, as in triton.language.randn.
    """
    size = math.prod(shape)
    place = torch.arange(size, device=seeds.device).expand(len(seeds), size)
    zero = torch.zeros_like(place)
    words = philox_words([place, zero, zero, zero], seeds[:, None])
    u_1, u_2 = (_uniform(word) for word in words[:2])
    radius = (-2.0 * u_1.clamp(min=1e-7).log()).sqrt()
    return (radius * (2.0 * math.pi * u_2).cos()).view(len(seeds), *shape)


def philox_words(counter: list[Tensor], seed: Tensor) -> list[Tensor]:
    """The four random words of a counter of four words, each 32 bits in an int64; seed int64, broadcast to them."""
    key = [seed & _WORD, seed >> 32 & _WORD]
    for _ in range(10):
        b, a = _PHILOX_B * counter[2], _PHILOX_A * counter[0]  # wraps around 2^64; the upper words are masked
        low_b, low_a = b & _WORD, a & _WORD
        # In place: what it takes is memory for new tensors.
        high_b = b.bitwise_right_shift_(32).bitwise_and_(_WORD).bitwise_xor_(counter[1]).bitwise_xor_(key[0])
        high_a = a.bitwise_right_shift_(32).bitwise_and_(_WORD).bitwise_xor_(counter[3]).bitwise_xor_(key[1])
        counter = [high_b, low_b, high_a, low_a]
        key = [key[0] + _KEY_A & _WORD, key[1] + _KEY_B & _WORD]
    return counter


_WORD = 0xFFFFFFFF
_PHILOX_A, _PHILOX_B, _KEY_A, _KEY_B = 0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85


def _uniform(word: Tensor) -> Tensor:
    """Numbers in [0, 1) float32 from 32 bits in an int64; the upper half of all words is mirrored onto the lower."""
    folded = torch.where(word > 0x7FFFFFFF, _WORD - word, word)
    return folded.float() * 4.6566127342e-10


def gaussian_kl(m: Tensor, m_ref: Tensor, coef: Tensor) -> Tensor:
    b, sigma = _column(coef, 1), _column(coef, 2)
    return 0.5 * (b / sigma * (_wide(m) - _wide(m_ref))).square().mean(dim=(1, 2, 3))


def _stats(log_ratio: Tensor, clip_range: float) -> RatioStats:
    # expm1, because in float32 exp(d) - 1 - d is nothing but rounding below |d| = 3e-4, where these ratios lie
    deviation = torch.expm1(log_ratio)
    return RatioStats(
        ratio_mean=1.0 + deviation.mean(),
        ratio_max_deviation=deviation.abs().max(),
        clip_fraction_above=(deviation > clip_range).to(deviation.dtype).mean(),
        clip_fraction_below=(deviation < -clip_range).to(deviation.dtype).mean(),
        mean_kl=-log_ratio.mean(),
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


def rebel_residual(log_prob: Tensor, log_prob_old: Tensor, rewards: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    moved = (_wide(log_prob) - _wide(log_prob_old)).sum(dim=1)  # (2 P,)
    rewards = _wide(rewards)
    residual = (moved[0::2] - moved[1::2]) / eta - (rewards[0::2] - rewards[1::2])
    weight = 2.0 * residual / (len(residual) * eta)
    return residual, torch.stack([weight, -weight], dim=1).flatten()


def group_norm_silu(x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
    normalised = F.group_norm(x, num_groups, weight, bias, eps)
    return F.silu(normalised) if silu else normalised


def group_norm_silu_in_place(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool
) -> Tensor:
    """The same in the memory format of x, by operations that a compiler fuses; float32 statistics, rounded once.

    torch's group_norm makes its input contiguous on every device but the CPU: a channels_last network is laid out anew
    before and after each norm, forward and backward.
    """
    groups = x.float().unflatten(1, (num_groups, -1))  # (N, G, C / G, H, W), a view in either format
    variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)
    normalised = ((groups - mean) * (variance + eps).rsqrt()).flatten(1, 2)
    y = normalised * weight.float()[:, None, None] + bias.float()[:, None, None]
    return (F.silu(y) if silu else y).to(x.dtype)
