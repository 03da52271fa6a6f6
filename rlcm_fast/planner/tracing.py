"""Measures what a network's passes allocate and compute, by running its real code on meta tensors.

    architecture, dtype, recomputation -> NetworkProfile: bytes over the rows of a batch, FLOPs per row

Meta tensors have shapes and no memory, so SDXL takes seconds on a laptop. Two things make the result hold for a GPU:
 1. `LiveBytes` counts storages while they live, as a caching allocator does; activations are what a forward leaves.
 2. On meta tensors torch's attention uses its mathematical path, which would materialise the N x N scores. A GPU uses
    a fused kernel (flash, or memory-efficient for float32 and wide heads), so this module calls that kernel instead.
Tracing sees neither the allocator's rounding and fragments nor the libraries' workspaces; `estimate.py` adds constants.
"""

# R rows of the network's batch, C h w latent, L tokens, E embedding

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlcm_fast.engine.recomputation import set_recomputation
from rlcm_fast.planner.architecture import Architecture, Size, sides

Recompute = Literal["none", "block", "selective"]
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

_ATEN = torch.ops.aten
_CONVOLUTIONS = (_ATEN.convolution, _ATEN.convolution_backward)
_FEW, _MANY = (1, 2), 64  # numbers of rows to trace; for training up to at least 64
_MOST_FLASH_HEAD = 256  # channels of a head; above this torch chooses the memory-efficient kernel


@dataclass(frozen=True)
class Curve:
    """Bytes as a function of a batch's rows: exact at traced sizes, linear between and beyond them.

    A peak is the largest of many sums of a constant and a multiple of the rows, so it is convex: between two traced
    sizes the straight line lies on it or above. For full-size UNets it is one line through 0.
    """

    points: tuple[tuple[int, int], ...]  # rows, bytes; two or more, ascending

    def __call__(self, rows: int) -> float:
        pairs = list(zip(self.points, self.points[1:]))
        (start, low), (end, high) = next((pair for pair in pairs if rows <= pair[1][0]), pairs[-1])
        return low + (high - low) / (end - start) * (rows - start)


@dataclass(frozen=True)
class Setup:
    """The settings that a UNet's profile depends on, besides its architecture."""

    dtype: torch.dtype
    recompute: Recompute = "none"
    lora_rank: int = 0
    image_size: Size | None = None  # pixels; None: as the UNet's config says
    device: Literal["cuda", "cpu"] = "cuda"  # whose attention kernel to trace
    text_chunks: int = 1  # chunks of a text's encoding, each as long as the text encoder's input


@dataclass(frozen=True)
class Flops:
    """Floating point operations, in two kinds: by torch's default, float32 convolutions run on tensor cores (TF32)."""

    convolutions: float
    others: float

    @property
    def total(self) -> float:
        return self.convolutions + self.others

    def __add__(self, more: Flops) -> Flops:
        return Flops(self.convolutions + more.convolutions, self.others + more.others)

    def __mul__(self, times: float) -> Flops:
        return Flops(self.convolutions * times, self.others * times)


@dataclass(frozen=True)
class NetworkProfile:
    """A UNet's weights, and the bytes and FLOPs of its passes; the bytes leave out weights and gradients."""

    trainable: tuple[int, ...]  # elements of each trained tensor
    frozen: int  # elements of all others
    saved: Curve  # live between the forward and the backward pass
    training_peak: Curve  # while gradients are added to those of earlier micro-batches
    sampling_peak: Curve
    forward_flops: Flops  # per row
    training_flops: Flops  # per row: forward pass, recomputation and backward pass
    forward_calls: int  # operations of a pass, whatever its rows
    training_calls: int


@dataclass(frozen=True)
class ImageProfile:
    """A VAE's decoder or encoder: its weights, and one pass."""

    numel: int
    peak: Curve
    flops: Flops  # per image


@dataclass(frozen=True)
class VaeProfile:
    """A VAE's decoder and its encoder, which is on the GPU only for real images."""

    decoder: ImageProfile
    encoder: ImageProfile


@dataclass(frozen=True)
class Pass:
    """What tracing one batch found: bytes and FLOPs."""

    saved: int
    peak: int
    forward_flops: Flops
    flops: Flops
    forward_calls: int
    calls: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are made under this mode and still live; the storages of `known` do not count.

    It counts operations and FLOPs too, by torch's formulas. FlopCounterMode is no alternative: it keeps alive what
    checkpointing computes again.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.flops = Flops(0, 0)
        self.calls = 0  # of operations, each of which a GPU is told to start
        self._sizes: dict[int, int] = {}
        self._watches: dict[int, weakref.ref] = {}
        for tensor in known:
            self._add(tensor, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        if func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
            self.flops += Flops(count, 0) if func.overloadpacket in _CONVOLUTIONS else Flops(0, count)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf, leaf.untyped_storage().nbytes())
        return result

    def _add(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = size
        self._watches[key] = weakref.ref(storage, partial(self._remove, key))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _remove(self, key: int, _: weakref.ref) -> None:
        self.now -= self._sizes.pop(key)
        del self._watches[key]


def profile_unet(architecture: Architecture, setup: Setup, rows: int) -> NetworkProfile:
    """Traces training at 1, at `rows` and at many rows, and sampling; SDXL takes about 20 seconds on two CPU cores."""
    unet = prepare_unet(architecture.build_unet(), setup)
    parameters = list(unet.parameters())
    sizes = sorted({1, rows, max(_MANY, 2 * rows)})
    training = {n: trace_unet(unet, architecture, setup, n, trains=True) for n in sizes}
    sampling = {n: trace_unet(unet, architecture, setup, n, trains=False) for n in _FEW}
    return NetworkProfile(
        trainable=tuple(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(p.numel() for p in parameters if not p.requires_grad),
        saved=Curve(tuple((n, training[n].saved) for n in sizes)),
        training_peak=Curve(tuple((n, training[n].peak) for n in sizes)),
        sampling_peak=Curve(tuple((n, sampling[n].peak) for n in _FEW)),
        forward_flops=training[1].forward_flops,
        training_flops=training[1].flops,
        forward_calls=training[1].forward_calls,
        training_calls=training[1].calls,
    )


def profile_vae(architecture: Architecture, image_size: Size, dtype: torch.dtype) -> VaeProfile:
    """Traces how the VAE decodes latents to images and encodes images to latents."""
    vae: Any = nn.Module.to(architecture.build_vae(), dtype).requires_grad_(False)
    height, width = sides(image_size)
    scale = architecture.pixels_per_latent

    def profile(names: Sequence[str], work: Callable[[Tensor], Any], *shape: int) -> ImageProfile:
        parts = [part for name, part in vae.named_children() if name in names]
        numel, passes = sum(p.numel() for part in parts for p in part.parameters()), {}
        for rows in _FEW:
            with LiveBytes(vae.parameters()) as passes[rows], _fused_attention("cuda"):
                work(torch.empty(rows, *shape, device="meta", dtype=dtype))
        return ImageProfile(numel, Curve(tuple((n, passes[n].peak) for n in _FEW)), passes[1].flops)

    latent = (architecture.unet["in_channels"], height // scale, width // scale)
    decode, encode = ("decoder", "post_quant_conv"), ("encoder", "quant_conv")
    decoder = profile(decode, lambda z: vae.decode(z, return_dict=False)[0].float(), *latent)
    encoder = profile(encode, lambda images: vae.encode(images, return_dict=False), 3, height, width)
    return VaeProfile(decoder, encoder)


def prepare_unet(unet: Any, setup: Setup) -> Any:
    """Makes the UNet as it is trained: dtype, LoRA, recomputation, and the gradients of an earlier micro-batch."""
    nn.Module.to(unet, setup.dtype)
    if setup.lora_rank > 0:
        unet.requires_grad_(False)
        unet.add_adapter(LoraConfig(r=setup.lora_rank, target_modules=LORA_TARGETS))
        cast_training_params(unet, torch.float32)  # as backbones/adapters.py
    set_recomputation(unet, setup.recompute)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.empty_like(parameter)
    return unet


def trace_unet(unet: Any, architecture: Architecture, setup: Setup, rows: int, trains: bool) -> Pass:
    """Traces one forward pass, and with `trains` a backward pass too."""
    parameters = list(unet.parameters())
    known = parameters + [p.grad for p in parameters if p.grad is not None]
    mode = torch.enable_grad() if trains else torch.no_grad()
    with LiveBytes(known) as live, _fused_attention(setup.device), mode:
        inputs = unet_inputs(architecture, setup, rows, parameters[0].device)
        output = unet(**inputs, return_dict=False)[0].float()
        loss = output.square().mean()
        del output
        saved, forward_flops, forward_calls = live.now, live.flops, live.calls
        if trains:
            loss.backward()
    return Pass(saved, live.peak, forward_flops, live.flops, forward_calls, live.calls)


def unet_inputs(architecture: Architecture, setup: Setup, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Makes the arguments of UNet2DConditionModel.forward, all zeros: x_t (R, C, h, w), timesteps (R,), text (R, L, E).

    Some UNets get more: the guidance scale's embedding; in SDXL the pooled text and the six sizes (R, 6).
    """
    config = architecture.unet
    pixels = sides(setup.image_size or architecture.image_size)
    latent = [side // architecture.pixels_per_latent for side in pixels]
    zeros = partial(torch.zeros, device=device, dtype=setup.dtype)
    inputs: dict[str, Any] = {
        "sample": zeros(rows, config["in_channels"], *latent),
        "timestep": torch.zeros(rows, device=device, dtype=torch.int64),
        "encoder_hidden_states": zeros(
            rows, architecture.num_tokens * setup.text_chunks, config["cross_attention_dim"]
        ),
    }
    if config.get("time_cond_proj_dim"):
        inputs["timestep_cond"] = zeros(rows, config["time_cond_proj_dim"])
    if config.get("addition_embed_type") == "text_time":  # SDXL
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        inputs["added_cond_kwargs"] = {"text_embeds": zeros(rows, pooled), "time_ids": zeros(rows, 6)}
    return inputs


@contextlib.contextmanager
def _fused_attention(device: Literal["cuda", "cpu"]) -> Iterator[None]:
    """Replaces torch's choice of an attention kernel by the choice that it makes on `device`.

    A TorchFunctionMode would not do: it is off inside `backward`, where checkpointing runs the forward pass again.
    """
    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = partial(_attention, device)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def _attention(
    device: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Calls the kernel that scaled_dot_product_attention would choose on `device`."""
    if device == "cpu":
        fused = _ATEN._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
    # On a GPU: flash for half precision without a mask and with narrow heads, else the memory-efficient kernel.
    is_half = query.dtype in (torch.bfloat16, torch.float16)
    if is_half and attn_mask is None and query.shape[-1] <= _MOST_FLASH_HEAD:
        fused = _ATEN._scaled_dot_product_flash_attention
        return fused(query, key, value, dropout_p, is_causal, scale=scale)[0]
    fused = _ATEN._scaled_dot_product_efficient_attention
    keeps_sums = any(tensor.requires_grad for tensor in (query, key, value))
    return fused(query, key, value, attn_mask, keeps_sums, dropout_p, is_causal, scale=scale)[0]
