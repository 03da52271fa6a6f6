"""How the passes of the network run: memory format, attention, torch.compile. Weights keep their values and names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlcm_fast.config import EngineConfig
from rlcm_fast.kernels.patch import fuse_group_norms

_MAX_GRAPHS = 128  # torch's limit of 8 counts the graphs of all blocks together, and SD 1.5 has blocks of four shapes

# Inductor's layout optimisation gave wrong gradients for a UNet of 8 and 16 channels compiled whole (torch 2.13 on a
# CPU): 127 of 209 were wrong and 84 of these zero, while the outputs were right. Without it all are right. It would
# choose the layout of convolutions, which engine.channels_last has chosen already.
_WHOLE = {"layout_optimization": False}


def accelerate(unet: Any, engine: EngineConfig, backend: Any = "inductor") -> None:
    """Accelerate the UNet in place; call it before the engine wraps the UNet. `backend` is for tests."""
    if engine.channels_last and engine.zero_stage == 0:
        unet.to(memory_format=torch.channels_last)
    elif engine.channels_last:
        _give_channels_last(unet)
    if engine.group_norm == "fused":
        fuse_group_norms(unet)
    if engine.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    compile_unet(unet, engine.compile, backend)


def _give_channels_last(unet: torch.nn.Module) -> None:
    """Hand every convolution its input in channels_last; its output is so too, whatever the layout of its weight.

    ZeRO flattens weights in their logical order from stage 1 on, so they must stay contiguous. torch lays a weight out
    anew in each pass, which reads and writes 2 bytes each of SD 1.5's convolutions (half of its 860 million weights).
    """

    def relaid(_: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])

    for module in unet.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_pre_hook(relaid)


def compile_unet(unet: Any, mode: str, backend: Any = "inductor") -> None:
    """Compile the UNet as engine.compile says, and no longer as it was compiled before; auto is off here.

    torch.compile makes one graph for each shape, with and without gradients, when it is first used. torch keeps the
    graphs in its cache on disk for later runs.
    """
    # Take away what is there.
    _compiled_parts(unet)
    if mode in ("regional", "whole"):
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_GRAPHS)

    # unet.compile() would also compile the hooks of the engine, and those of DeepSpeed read the clock.
    if mode == "regional":
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    elif mode == "whole":
        options: Any = _WHOLE if backend == "inductor" else None
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, backend=backend, options=options)


def _compiled_parts(unet: Any) -> list[tuple[torch.nn.Module, str, Any]]:
    """Removes the compiled functions of the UNet and its blocks, and returns them: module, name, function."""
    names = dict.fromkeys(unet.modules(), "_compiled_call_impl")  # what torch.nn.Module.compile sets
    places = [(unet, "forward"), *names.items()]
    return [(module, name, vars(module).pop(name)) for module, name in places if name in vars(module)]


@contextmanager
def uncompiled(unet: Any) -> Iterator[None]:
    """Run a UNet without its compilation inside the block."""
    parts = _compiled_parts(unet)
    try:
        yield
    finally:
        for module, name, compiled in parts:
            setattr(module, name, compiled)
