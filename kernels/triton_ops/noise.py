"""Standard normal numbers that a kernel draws from a seed and a place, the same in every batch and block."""

# pyright: reportGeneralTypeIssues=false
# triton declares the functions that a kernel calls as NoReturn.

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.random import uint_to_uniform_float

from rlcm_fast.kernels.triton_ops.rounding import product


@triton.jit
def normal(seed, place):
    """Standard normal numbers by Philox and Box-Muller, as in triton.language.randn."""
    word_1, word_2, _, _ = tl.randint4x(seed, place)
    u_1, u_2 = uint_to_uniform_float(word_1), uint_to_uniform_float(word_2)
    return tl.sqrt(-2.0 * tl.log(tl.maximum(u_1, 1e-7))) * _cos_of_turns(u_2)


@triton.jit
def _cos_of_turns(u):
    """cos(2 pi u) for u in [0, 1), folded to an eighth of a turn, where the error of the series is below 1e-8.

    tl.cos accepts any angle, and for large angles it keeps 32 bytes per thread in memory.
    """
    t = tl.abs(u - 0.5)
    is_far = t > 0.25
    t = tl.where(is_far, 0.5 - t, t)
    is_sine = t > 0.125
    angle = 6.283185307179586 * tl.where(is_sine, 0.25 - t, t)
    s = angle * angle
    cosine = -1 / 720 + product(s, 1 / 40320 - s / 3628800)
    cosine = 1.0 + product(s, -1 / 2 + product(s, 1 / 24 + product(s, cosine)))
    sine = 1 / 120 + product(s, -1 / 5040 + s / 362880)
    sine = angle * (1.0 + product(s, -1 / 6 + product(s, sine)))
    value = tl.where(is_sine, sine, cosine)
    return tl.where(is_far, value, -value)
