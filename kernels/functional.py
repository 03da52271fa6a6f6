"""One documented function per op; `dispatch.py` decides whether it runs in Triton or in plain torch.

Sampling and training both come here to turn a network output into a state, a log-probability, a divergence or a loss.
Each input may be float32, bfloat16 or float16, contiguous or channels_last, also a slice of rows of a larger tensor.
Arithmetic and results are float32; only group_norm_silu returns the dtype of x. The torch implementation also accepts
float64, which stays float64, and differentiates everything; each docstring says what Triton differentiates.
"""

# N rows (samples or transitions), C H W latent; coef rows are A, B, sigma of x_s = A x_t + B m + sigma z

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from rlcm_fast.kernels import dispatch, reference, reference_adamw
from rlcm_fast.kernels.quantization import has_memory_order_of, in_memory_order
from rlcm_fast.kernels.reference import RatioStats
from rlcm_fast.kernels.reference_adamw import AdamWScalars

__all__ = [
    "Moments",
    "RatioStats",
    "adamw_8bit_",
    "add_rounded_",
    "clipped_ratio_loss",
    "gaussian_kl",
    "gaussian_log_prob",
    "gaussian_mean",
    "gaussian_step",
    "group_norm_silu",
    "policy_loss",
    "rebel_residual",
]


def gaussian_mean(x: Tensor, m: Tensor, coef: Tensor) -> Tensor:
    """The mean of the next state, A x + B m (N, C, H, W), from x and m (N, C, H, W) and coef (N, 3); ignores sigma.

    It always runs in plain torch, because a sample needs it only once, for its image.
    """
    return reference.gaussian_mean(x, m, coef)


def gaussian_log_prob(
    x: Tensor,
    m: Tensor,
    x_next: Tensor,
    coef: Tensor,
    m_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """The log-probability (N,) of x_next under N(A x + B m, sigma^2), mean over C, H, W, in nats per dimension.

    x, m and x_next are (N, C, H, W); coef is (N, 3) with sigma > 0 in every row. A row with sigma = 0 is no action: its
    log-probability is 0 in Triton, and infinite or NaN in torch. A check would wait for the device, so there is none.
    With m_uncond (N, C, H, W), the network output is m_uncond + guidance_scale (m - m_uncond), which is not stored.
    The result is differentiable in x, m, m_uncond and x_next.
    """
    if not dispatch.is_triton(x, m, x_next, coef, m_uncond):
        m = m if m_uncond is None else reference.guided(m, m_uncond, guidance_scale)
        return reference.gaussian_log_prob(x, m, x_next, coef)
    from rlcm_fast.kernels.triton_ops import gaussian

    return gaussian.gaussian_log_prob(x, m, m_uncond, x_next, _rows_of(coef), float(guidance_scale))


def gaussian_step(
    x: Tensor,
    m: Tensor,
    coef: Tensor,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    m_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The next state A x + B m + sigma noise (N, C, H, W) and its log-probability (N,), mean over C, H, W.

    Give noise (N, C, H, W) or seeds (N,) int64. With seeds, each row draws standard normal numbers by Philox from its
    seed and the place in the row, so batch and block size do not matter. m_uncond works as in gaussian_log_prob.

    Rows with sigma = 0 return the mean and log-probability 0. The log-probability belongs to the ROUNDED next state and
    uses the arithmetic of gaussian_log_prob, not -mean(noise^2)/2 - log sigma - log(2 pi)/2. The two differ by the
    rounding of x_next over sigma, and only the first makes the ratio of an unchanged network exactly one. Triton
    computes no gradient.
    """
    if (noise is None) == (seeds is None):
        raise ValueError("gaussian_step needs either noise or seeds; give exactly one of them")
    # Draw the same numbers from the seeds in torch as in Triton.
    if not dispatch.is_triton(x, m, coef, noise, m_uncond):
        m = m if m_uncond is None else reference.guided(m, m_uncond, guidance_scale)
        noise = noise if seeds is None else reference.philox_normal(seeds, x.shape[1:])
        assert noise is not None
        return reference.gaussian_step(x, m, coef, noise)
    from rlcm_fast.kernels.triton_ops import gaussian

    with torch.no_grad():
        dense = None if seeds is None else seeds.contiguous()
        return gaussian.gaussian_step(x, m, m_uncond, _rows_of(coef), noise, dense, float(guidance_scale))


def gaussian_kl(m: Tensor, m_ref: Tensor, coef: Tensor) -> Tensor:
    """KL divergence (N,) between the actions of two networks in one state, in nats per dimension.

    It is the mean over C, H, W of (B (m - m_ref))^2 / (2 sigma^2), a closed form because both share sigma. m and m_ref
    are (N, C, H, W); coef is (N, 3) with sigma > 0. It always runs in plain torch.
    """
    return reference.gaussian_kl(m, m_ref, coef)


def clipped_ratio_loss(
    log_prob: Tensor, log_prob_old: Tensor | None, advantages: Tensor, clip_range: float, advantage_clip: float
) -> tuple[Tensor, RatioStats]:
    """PPO's clipped loss (), mean over rows of max(-a rho, -a clip(rho, 1 - clip_range, 1 + clip_range)), and stats.

    log_prob, log_prob_old and advantages are (N,). rho = exp(log_prob - log_prob_old), with the exponent clamped to
    +-20; a is the advantage clamped to +-advantage_clip. log_prob_old=None means on-policy: rho is exactly 1 with the
    gradient of log_prob. The loss is differentiable in log_prob; log_prob_old counts as a constant.
    """
    if not dispatch.is_triton(log_prob, log_prob_old, advantages):
        return reference.clipped_ratio_loss(log_prob, log_prob_old, advantages, clip_range, advantage_clip)
    from rlcm_fast.kernels.triton_ops import loss

    old = None if log_prob_old is None else _rows_of(log_prob_old)
    value, stats = loss.clipped_ratio_loss(
        log_prob.float().contiguous(), old, _rows_of(advantages), float(clip_range), float(advantage_clip)
    )
    return value, RatioStats(*stats.unbind())


def policy_loss(
    x: Tensor,
    m: Tensor,
    x_next: Tensor,
    coef: Tensor,
    log_prob_old: Tensor | None,
    advantages: Tensor,
    clip_range: float,
    advantage_clip: float,
    m_uncond: Tensor | None = None,
    guidance_scale: float = 1.0,
    factor: float = 1.0,
) -> tuple[Tensor, RatioStats]:
    """`clipped_ratio_loss` of `gaussian_log_prob`: the loss () and the stats, differentiable in x, m, m_uncond, x_next.

    Triton needs one launch, and one in the backward pass for each input that requires a gradient. On-policy, without
    guidance, the first launch writes the gradient in m too. `factor` is what you multiply the loss by before its
    backward pass, such as a micro-batch's share; the value that is returned does not contain it. If another factor
    comes, the result is the same, only slower.
    """
    if not dispatch.is_triton(x, m, x_next, coef, m_uncond, log_prob_old, advantages):
        log_prob = gaussian_log_prob(x, m, x_next, coef, m_uncond, guidance_scale)
        return reference.clipped_ratio_loss(log_prob, log_prob_old, advantages, clip_range, advantage_clip)
    from rlcm_fast.kernels.triton_ops import loss

    old = None if log_prob_old is None else _rows_of(log_prob_old)
    settings = (float(clip_range), float(advantage_clip), float(factor))
    value, stats = loss.policy_loss(
        x, m, m_uncond, x_next, _rows_of(coef), float(guidance_scale), old, _rows_of(advantages), *settings
    )
    return value, RatioStats(*stats.unbind())


def rebel_residual(log_prob: Tensor, log_prob_old: Tensor, rewards: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """REBEL's residual (P,) of P pairs of trajectories, and the gradient (2 P,) of its mean square in their log-probs.

    log_prob and log_prob_old (2 P, K) hold the K actions of each trajectory; rewards is (2 P,). Rows 2 i and 2 i + 1
    are the pair y and y', two images of one prompt. With d = sum over k of log_prob - log_prob_old (arXiv 2404.16767):

        residual = (d(y) - d(y')) / eta - (r(y) - r(y')),      loss = mean(residual^2)
        d loss / d log_prob_k(y) = 2 residual / (P eta) = -d loss / d log_prob_k(y'),      the same for every action k

    So you can train in two passes with the memory of one action: compute the log-probs of all actions without
    gradients, then call `(gradient * gaussian_log_prob(...)).sum().backward()` action by action. Autograd treats the
    results as constants.
    """
    if log_prob.ndim != 2 or len(log_prob) % 2 or log_prob.shape != log_prob_old.shape or len(rewards) != len(log_prob):
        raise ValueError(
            f"log_prob {tuple(log_prob.shape)}, log_prob_old {tuple(log_prob_old.shape)}, rewards "
            f"{tuple(rewards.shape)}: give (2 P, K), (2 P, K) and (2 P,), pairs in neighbouring rows"
        )
    # Compute constants, in torch or in Triton.
    with torch.no_grad():
        if not dispatch.is_triton(log_prob, log_prob_old, rewards):
            return reference.rebel_residual(log_prob, log_prob_old, rewards, eta)
        from rlcm_fast.kernels.triton_ops import rebel

        return rebel.rebel_residual(_rows_of(log_prob), _rows_of(log_prob_old), _rows_of(rewards), float(eta))


@dataclass(frozen=True)
class Moments:
    """Adam's two moments of one weight, written in place: uint8 codes with a scale per block, or plain float32."""

    state1: Tensor  # shape and strides of the weight; uint8 or float32
    state2: Tensor  # as state1
    absmax1: Tensor | None  # (ceil(numel / 256),) float32 for uint8, None for float32
    absmax2: Tensor | None  # as absmax1


def adamw_8bit_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Sequence[Moments],
    indices: Sequence[int],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    seed: int = 0,
    stochastic_rounding: bool = True,
    grad_scale: Tensor | None = None,
    counts: Tensor | None = None,
) -> None:
    """Make one step of AdamW (arXiv 1711.05101) in place, with 8-bit moments (arXiv 2110.02861, quantization.py).

        g = grad_scale grad,   m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
        p = (1 - lr weight_decay) p - lr / (1 - b1^step) m / (sqrt(v / (1 - b2^step)) + eps)

    params: float32 or bfloat16, dense, in any memory format. grads: float32 or bfloat16; a gradient is copied if its
    strides differ from those of its weight. Arithmetic is float32. step: counts from 1. grad_scale: () float32 on the
    device, multiplies the gradients, so that clipping need not wait for their norm; one that is not finite leaves
    weights, moments and counts as they are. counts: (2,) int64, incremented by
    the number of weights that should have changed, and by how many of those kept their value because of rounding.
    stochastic_rounding: applies to bfloat16 weights. An update below half of their last unit is not lost, but happens
    with a probability proportional to its size. The random numbers have key `seed` and counter (place, step, index).
    indices: one number per weight, so that weights give the same result whether they step together or alone.

    Triton needs one launch for all weights of one dtype, one dtype of gradients and one kind of moments. Raises
    ValueError for other dtypes and for weights with gaps in memory.
    """
    # Sort the weights by what a launch must share.
    scalars = AdamWScalars.at(step, lr, betas, eps, weight_decay)
    kinds: dict[tuple, list[int]] = defaultdict(list)
    for i, (param, grad, moment) in enumerate(zip(params, grads, moments, strict=True)):
        _check_dtypes(param, grad)
        kinds[param.dtype, grad.dtype, moment.state1.dtype, param.device].append(i)
    # Step each kind.
    for (param_dtype, *_), places in kinds.items():
        rounds = stochastic_rounding and param_dtype == torch.bfloat16
        _step_kind(
            [params[i] for i in places], [_strided_like(params[i], grads[i]) for i in places],
            [moments[i] for i in places], [indices[i] for i in places], scalars, step, seed, rounds, grad_scale, counts,
        )  # fmt: skip


@torch.no_grad()
def _step_kind(params, grads, moments, indices, scalars, *step_and_rest) -> None:
    absmax1 = [moment.absmax1 for moment in moments if moment.absmax1 is not None]
    absmax2 = [moment.absmax2 for moment in moments if moment.absmax2 is not None]
    states = ([moment.state1 for moment in moments], [moment.state2 for moment in moments], absmax1, absmax2)
    if dispatch.is_triton(*params):
        from rlcm_fast.kernels.triton_ops import adamw

        return adamw.adamw_8bit_(params, grads, *states, indices, list(astuple(scalars)), *step_and_rest)
    return reference_adamw.adamw_8bit_(params, grads, *states, indices, scalars, *step_and_rest)


@torch.no_grad()
def add_rounded_(total: Tensor, addend: Tensor, *, seed: int, addition: Tensor, index: int) -> None:
    """Add the bfloat16 tensor `addend` to `total` in place, so that the expected result equals the exact sum.

    The sum is rounded stochastically, as weights are in adamw_8bit_. Rounding to nearest loses what is added to a sum
    256 times as large; this keeps it on average, without memory for more digits.

    addition: (2,) int64 on the same device, (step, number). The number counts the additions of a step from 1; the
    random numbers have key `seed` and counter (place, step, index, number). With number 0 the sum is rounded to
    nearest. Both are read on the device, so a CUDA graph that is replayed rounds anew once they have changed.

    Raises ValueError for other dtypes and for tensors with gaps in memory.
    """
    for name, tensor in (("total", total), ("addend", addend)):
        if tensor.dtype != torch.bfloat16:
            raise ValueError(f"add_rounded_ needs a bfloat16 {name}, not {tensor.dtype}; float32 sums need no rounding")
    addend = _strided_like(total, addend)
    if dispatch.is_triton(total, addend):
        from rlcm_fast.kernels.triton_ops import accumulation

        return accumulation.add_rounded_(total, addend, seed, addition, index)
    return reference_adamw.add_rounded_(total, addend, seed, addition, index)


def _check_dtypes(param: Tensor, grad: Tensor) -> None:
    for name, tensor in (("weights", param), ("gradients", grad)):
        if tensor.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"adamw_8bit_ needs float32 or bfloat16 {name}, not {tensor.dtype}; convert them")


def _strided_like(param: Tensor, grad: Tensor) -> Tensor:
    """The gradient with its elements in the memory order of the weight; a copy only if the order differs."""
    in_memory_order(param)
    return grad if has_memory_order_of(grad, param) else torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def group_norm_silu(
    x: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, silu: bool = True
) -> Tensor:
    """silu(GroupNorm(x)) (N, C, H, W) in the dtype and memory format of x; GroupNorm alone if `silu` is False.

    x is (N, C, H, W); weight and bias are (C,). The result is differentiable in all three. torch rounds to the dtype of
    x after GroupNorm and again after SiLU, and accepts the mixtures of dtypes that torch.nn.functional.group_norm
    accepts. Triton accepts every mixture, rounds once, and computes float32 statistics in two passes. For the backward
    pass it keeps x and 2 N num_groups numbers; torch keeps the output of GroupNorm too. If the gradient of y has
    another memory format than x, Triton copies it.
    """
    channels = x.shape[1] if x.ndim == 4 else 0
    if not channels or weight.shape != (channels,) or bias.shape != (channels,):
        raise ValueError(
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, bias {tuple(bias.shape)}: give (N, C, H, W), (C,), (C,)"
        )
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups={num_groups} must divide C={channels}; try {math.gcd(num_groups, channels)}")
    # Compute in torch or in Triton.
    if not dispatch.is_triton(x, weight, bias):
        return reference.group_norm_silu(x, num_groups, weight, bias, eps, silu)
    from rlcm_fast.kernels.triton_ops import group_norm

    return group_norm.group_norm_silu(x, weight, bias, num_groups, eps, silu)[0]


def _rows_of(values: Tensor) -> Tensor:
    """Coefficients (N, 3), or a number for each row (N,), as the kernels read them: constants, float32, dense."""
    if values.dtype == torch.float32 and not values.requires_grad and values.is_contiguous():
        return values
    return values.detach().float().contiguous()
