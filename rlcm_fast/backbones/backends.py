"""What torch chooses for the whole process on a GPU: cuDNN's search, float32 products, the kernel of attention.

It is set once, before the network first runs, and said in one line.
"""

# B rows, H heads, L tokens, E size of a head

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib import import_module
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


def check_attention(engine: EngineConfig, device: torch.device) -> None:
    """Raises ValueError if a kernel of GPUs is asked for elsewhere, before weights load."""
    if engine.attention not in ("auto", "sdpa") and device.type != "cuda":
        raise ValueError(
            f"engine.attention={engine.attention} needs a CUDA device, and this is a {device.type}; set "
            "engine.attention=auto"
        )


def set_backends(
    engine: EngineConfig, network: Mapping[str, Any], like: Tensor, is_kept: bool = False
) -> tuple[str, str]:
    """Sets them for a UNet of the config `network`; returns the kind of attention, and the lines that say all of it.

    like: (B, C, H, W) of the device, the dtype and the size of an update's micro-batch. is_kept: engine.attention is
    what a run that resumes began with, and may change if it must. A CPU has no choice. Every process must call this.

    Raises:
        ValueError: engine.attention names a kernel that cannot run here.
    """
    if like.device.type != "cuda":
        return ("sdpa" if engine.attention == "auto" else engine.attention), ""
    # The algorithms of cuDNN that are fastest here; with fixed shapes the search runs once for each.
    torch.backends.cudnn.benchmark = not engine.deterministic
    attention, note = choose_attention(engine, attention_shapes(network, like.shape), like, is_kept)
    use_attention(attention)
    search = "on" if torch.backends.cudnn.benchmark else "off"
    precision = torch.get_float32_matmul_precision()
    line = f"cuDNN's search for algorithms {search}, float32 products {precision}, attention {attention}"
    return attention, note + line


def choose_attention(engine: EngineConfig, shapes: Sequence[Shape], like: Tensor, is_kept: bool) -> tuple[str, str]:
    """Returns the kind of attention, the same on all processes, and what to say about a change of it."""
    # Leave what needs no measurement, and what can run.
    kind = engine.attention
    if kind == "sdpa" or (kind == "auto" and engine.deterministic):
        return "sdpa", ""
    if kind != "auto" and slowest([kind], shapes, like)[kind] is not None:
        return kind, ""
    if kind != "auto" and not is_kept:
        raise ValueError(f"engine.attention={kind} cannot run on this GPU with this model; set engine.attention=auto")

    # Compilers break their graphs at xformers' attention, so it competes only where nothing is compiled.
    kinds = [*_KINDS, "xformers"] if engine.compile == "off" else [*_KINDS]
    fastest = prefer(slowest(kinds, shapes, like))
    changed = f"engine.attention={kind}, with which the run began, cannot run here: going on with {fastest}; "
    return fastest, changed if is_kept and kind != "auto" else ""


def slowest(kinds: Sequence[str], shapes: Sequence[Shape], like: Tensor) -> dict[str, float | None]:
    """Returns the seconds of each kind on the slowest process; None if one of them cannot run it."""
    found = parallel.all_gather_list([{kind: _seconds(kind, shapes, like) for kind in kinds}])
    can = {kind: [value for each in found if (value := each[kind]) is not None] for kind in kinds}
    return {kind: max(times) if len(times) == len(found) else None for kind, times in can.items()}


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
        num_rows, heads, length, size = shape
        values = torch.randn(num_rows, length, heads, size, generator=generator)  # as a linear layer leaves them
        return values.to(like.device, like.dtype).requires_grad_()

    inputs = [[drawn(shape) for _ in "qkv"] for shape in shapes]
    attend = _xformers if name == "xformers" else _torchs

    def run() -> None:
        for q, k, v in inputs:
            torch.autograd.grad(attend(q, k, v).sum(), [q, k, v])

    with sdpa_kernel(_KINDS[name]) if name in _KINDS else nullcontext():
        try:
            run()
        except (ImportError, OSError, RuntimeError, ValueError):  # how torch and xformers say that they cannot
            return None
        return timed(run, lambda: torch.cuda.synchronize(like.device))


def _torchs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attends as diffusers does with torch, all (B, L, H, E)."""
    return scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attends as diffusers does with xformers, which gets copies (B H, L, E)."""
    operations: Any = import_module("xformers.ops")
    rows = [each.transpose(1, 2).flatten(0, 1).contiguous() for each in (q, k, v)]
    return operations.memory_efficient_attention(*rows)


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
