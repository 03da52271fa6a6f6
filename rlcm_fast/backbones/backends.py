"""What torch chooses for the whole process on a GPU: cuDNN's search, float32 products, the kernel of attention.

It is set once, before the network first runs, and said in one line.
"""

# B rows, H heads, L tokens, E size of a head

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from rlcm_fast import parallel
from rlcm_fast.config import EngineConfig

_KINDS: dict[str, Any] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_NUM_RUNS = 5

Shape = tuple[int, int, int, int]  # B, H, L, E


def set_backends(engine: EngineConfig, network: Mapping[str, Any], like: Tensor) -> str:
    """Sets them for a UNet of the config `network`, and returns the line that says it; empty where there is no choice.

    like: (B, C, H, W) of the device, the dtype and the size of an update's micro-batch. Every process must call this.
    """
    if like.device.type != "cuda":
        return f"engine.attention=auto: sdpa on a {like.device.type}" if engine.attention == "auto" else ""
    # The algorithms of cuDNN that are fastest here; with fixed shapes the search runs once for each.
    torch.backends.cudnn.benchmark = not engine.deterministic
    attention = engine.attention
    if attention == "auto" and not engine.deterministic:
        shapes = attention_shapes(network, like.shape)
        times = {name: _seconds(name, shapes, like) for name in _KINDS}
        attention = parallel.all_gather_list([prefer(times)])[0]
        use_attention(attention)
    search = "on" if torch.backends.cudnn.benchmark else "off"
    precision = torch.get_float32_matmul_precision()
    return f"cuDNN's search for algorithms {search}, float32 products {precision}, attention {attention}"


def attention_shapes(network: Mapping[str, Any], latents: Sequence[int]) -> list[Shape]:
    """Returns the self-attentions of a UNet's levels for latents (B, C, H, W), one for each level that has them."""
    # diffusers names the number of heads attention_head_dim.
    channels, kinds = network["block_out_channels"], network["down_block_types"]
    heads = network.get("num_attention_heads") or network["attention_head_dim"]
    heads = [heads] * len(channels) if isinstance(heads, int) else heads
    num_rows, _, height, width = latents
    return [
        (num_rows, heads[level], (height >> level) * (width >> level), channels[level] // heads[level])
        for level, kind in enumerate(kinds)
        if "CrossAttn" in kind
    ]


def prefer(seconds: Mapping[str, float | None]) -> str:
    """Returns the fastest kind; None cannot run here. If none can, "sdpa" leaves the choice to torch."""
    can = {name: value for name, value in seconds.items() if value is not None}
    return min(can, key=lambda name: can[name]) if can else "sdpa"


def use_attention(name: str) -> None:
    """Makes scaled_dot_product_attention try one kind first, from now on; the others follow where it cannot run."""
    if name in _KINDS:
        others = [kind for kind in _KINDS.values() if kind != _KINDS[name]]
        order = [_KINDS[name], *others, SDPBackend.MATH]
        torch._C._set_sdp_priority_order([int(kind) for kind in order])


def _seconds(name: str, shapes: Sequence[Shape], like: Tensor) -> float | None:
    """Returns what attention takes forward and backward, once for each shape; None if this kind cannot do it."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Shape) -> Tensor:
        return torch.randn(shape, generator=generator).to(like.device, like.dtype).requires_grad_()

    inputs = [[drawn(shape) for _ in "qkv"] for shape in shapes]

    def run() -> None:
        for q, k, v in inputs:
            torch.autograd.grad(scaled_dot_product_attention(q, k, v).sum(), [q, k, v])

    with sdpa_kernel(_KINDS[name]):
        try:
            run()
        except RuntimeError:  # torch says so if no kernel is left
            return None
        return timed(run, lambda: torch.cuda.synchronize(like.device))


def timed(run: Callable[[], None], wait: Callable[[], None]) -> float:
    """Returns the shortest of some runs in seconds."""
    found = []
    for _ in range(_NUM_RUNS):
        wait()
        start = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - start)
    return min(found)
