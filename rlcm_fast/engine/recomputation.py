"""Activation recomputation: saves memory of the forward pass by computing parts of it twice.

block      each resnet and transformer block keeps only its input
selective  also keeps the outputs of convolutions, matrix products and attention: they cost most of the time and only a
           part of the memory

The network draws no random numbers (it is in eval mode), so their state is not kept for the second pass: reading it is
forbidden while a CUDA graph is captured.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_aten = torch.ops.aten
_KEPT = [
    _aten.convolution.default,
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def set_recomputation(unet: Any, kind: str) -> None:
    """Sets the recomputation (none, block or selective) of a diffusers UNet; passes without gradients do not change."""
    if kind == "block":
        unet.enable_gradient_checkpointing(_keeping_inputs)
    elif kind == "selective":
        unet.enable_gradient_checkpointing(_keeping_products)


def _keeping_inputs(module: Any, *arguments: Any) -> Any:
    return checkpoint(module.__call__, *arguments, use_reentrant=False, preserve_rng_state=False)


def _keeping_products(module: Any, *arguments: Any) -> Any:
    contexts = partial(create_selective_checkpoint_contexts, _KEPT)
    settings: Any = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": contexts}
    return checkpoint(module.__call__, *arguments, **settings)
