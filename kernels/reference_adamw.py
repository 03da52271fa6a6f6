"""AdamW with 8-bit moments and stochastically rounded bfloat16 weights, in plain torch: the specification.

m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
p = (1 - lr weight_decay) p - lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + eps)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.kernels.quantization import dequantize, in_memory_order, quantize
from rlcm_fast.kernels.reference import philox_words


@dataclass(frozen=True)
class AdamWScalars:
    """Factors of an AdamW step, computed once in double precision for every implementation; adamw_step uses them."""

    decay: float  # 1 - lr weight_decay
    step_size: float  # lr / (1 - beta_1^step)
    inverse_root: float  # 1 / sqrt(1 - beta_2^step)
    beta_1: float
    one_less_beta_1: float
    beta_2: float
    one_less_beta_2: float
    eps: float

    @classmethod
    def at(cls, step: int, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> AdamWScalars:
        """Compute the factors of update number `step`, which counts from 1."""
        beta_1, beta_2 = betas
        step_size, inverse_root = lr / (1 - beta_1**step), 1 / math.sqrt(1 - beta_2**step)
        return cls(1 - lr * weight_decay, step_size, inverse_root, beta_1, 1 - beta_1, beta_2, 1 - beta_2, eps)


def adamw_step(
    param: Tensor, grad: Tensor, m: Tensor, v: Tensor, scalars: AdamWScalars
) -> tuple[Tensor, Tensor, Tensor]:
    """New weights, first moment and second moment, all new float32 tensors.

    All inputs have one shape; m and v are float32.
    """
    g = grad.float()
    m = scalars.beta_1 * m + scalars.one_less_beta_1 * g
    v = scalars.beta_2 * v + scalars.one_less_beta_2 * (g * g)
    change = m / (v.sqrt() * scalars.inverse_root + scalars.eps)
    return scalars.decay * param.float() - scalars.step_size * change, m, v


def round_stochastically(values: Tensor, seed: int, step: int | Tensor, index: int, number: int | Tensor = 0) -> Tensor:
    """Round float32 values (n,) to bfloat16, so that the expected result equals the value.

    A value rounds up with probability (distance to the lower neighbour) / (distance between both neighbours). To do so,
    16 random bits are added to the 16 bits that bfloat16 drops. They come from Philox with key `seed` and counter
    (place // 8, step, index, number); one counter serves 8 places. Values that are not finite stay as they are.
    step and number: integers, or tensors () on the device of the values, where they are not read by the host.
    """
    noise = philox_halves(seed, (step, index, number), values.numel(), values.device)
    bits = values.view(torch.int32)
    rounded = ((bits + noise) & ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values).bfloat16()


def philox_halves(seed: int, counts: Sequence[int | Tensor], size: int, device: torch.device) -> Tensor:
    """Random numbers (size,) int32 in [0, 2^16); each of the four words of Philox makes two of them.

    counts: the counter's three words after the place.
    """
    place = torch.arange(-(-size // 8), device=device)
    counter = [place, *(torch.zeros_like(place) + count for count in counts)]  # full_like would read a tensor
    word_0, word_1, word_2, word_3 = philox_words(counter, torch.full((), seed, dtype=torch.int64, device=device))
    words = torch.stack([word_0, word_2, word_1, word_3], dim=1)  # the order in which the kernel joins the words
    return torch.stack([words & 0xFFFF, words >> 16], dim=2).flatten()[:size].int()


def add_rounded_(total: Tensor, addend: Tensor, seed: int, addition: Tensor, index: int) -> None:
    """Add bfloat16 tensors of the same dense strides in place, in float32; functional.add_rounded_ says how to round.

    addition: (2,) int64, the step and the number of the addition.
    """
    exact, (step, number) = total.float() + addend.float(), addition.unbind()
    values = in_memory_order(exact)
    at_random = round_stochastically(values, seed, step, index, number)
    rounded = torch.where(number == 0, values.bfloat16(), at_random)
    total.copy_(rounded.as_strided(exact.shape, exact.stride()))


def adamw_8bit_(
    params: Sequence[Tensor], grads: Sequence[Tensor], states_1: Sequence[Tensor], states_2: Sequence[Tensor],
    absmax_1: Sequence[Tensor], absmax_2: Sequence[Tensor], indices: Sequence[int], scalars: AdamWScalars,
    step: int, seed: int, rounds: bool, grad_scale: Tensor | None, counts: Tensor | None,
) -> None:  # fmt: skip
    """Step every weight in place, one after the other; the absmax lists are empty for float32 states."""
    for i, (param, grad, state_1, state_2) in enumerate(zip(params, grads, states_1, states_2, strict=True)):
        # Compute the new weights and moments in float32.
        grad = grad if grad_scale is None else grad.float() * grad_scale
        m = dequantize(state_1, absmax_1[i], is_signed=True) if absmax_1 else state_1
        v = dequantize(state_2, absmax_2[i], is_signed=False) if absmax_2 else state_2
        exact, m, v = adamw_step(param, grad, m, v, scalars)

        # Round the weights to their dtype, and count the updates that rounding loses.
        value = exact.to(param.dtype)
        if rounds:
            rounded = round_stochastically(in_memory_order(exact), seed, step, indices[i])
            value = rounded.as_strided(exact.shape, exact.stride())
        if counts is not None:
            is_wanted = exact != param
            lost = torch.stack([is_wanted.sum(), (is_wanted & (value == param)).sum()])
            counts += lost if grad_scale is None else lost * grad_scale.isfinite()
        _store(param, value, grad_scale)

        # Store the moments.
        if absmax_1:
            (m, largest_m), (v, largest_v) = quantize(m, is_signed=True), quantize(v, is_signed=False)
            _store(absmax_1[i], largest_m, grad_scale)
            _store(absmax_2[i], largest_v, grad_scale)
        _store(state_1, m, grad_scale)
        _store(state_2, v, grad_scale)


def _store(target: Tensor, value: Tensor, grad_scale: Tensor | None) -> None:
    """Write `value` to `target`, but not if there is a scale and it is not finite; nothing waits for the device."""
    target.copy_(value if grad_scale is None else torch.where(grad_scale.isfinite(), value, target))
