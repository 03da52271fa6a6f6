"""Arithmetic that rounds alike however a kernel is compiled."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(a, b):
    """a b, rounded. As a fused multiply-add of zero it cannot be fused with an addition that follows.

    Inductor compiles kernels with fusing allowed; the rounding would then differ from that of an eager call.
    """
    return tl.fma(a, b, 0.0)
