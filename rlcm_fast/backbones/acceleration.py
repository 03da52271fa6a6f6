"""How the passes of the network run: memory format, attention, torch.compile. Weights keep their values and names."""

from __future__ import annotations

from typing import Any

import torch

from rlcm_fast.config import EngineConfig

_MAX_GRAPHS = 128  # torch's limit of 8 counts the graphs of all blocks together, and SD 1.5 has blocks of four shapes


def check_device(engine: EngineConfig, device: torch.device) -> None:
    """Refuse what is known to go wrong on a device, before weights load; raises ValueError."""
    if engine.compile == "whole" and device.type == "cpu":
        raise ValueError(
            "engine.compile=whole gives wrong gradients on CPUs for some networks (seen with torch 2.13 and a UNet "
            "of 8 and 16 channels, whose outputs were right); set engine.compile=regional or off"
        )


def accelerate(unet: Any, engine: EngineConfig, backend: str = "inductor") -> None:
    """Accelerate the UNet in place; call it before the engine wraps the UNet.

    torch.compile makes one graph for each shape, with and without gradients, when it is first used. torch keeps the
    graphs in its cache on disk for later runs. `backend` is for tests.
    """
    if engine.compile != "off":
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_GRAPHS)
    if engine.channels_last:
        unet.to(memory_format=torch.channels_last)
    if engine.attention == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if engine.compile == "regional":
        unet.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=backend)
    elif engine.compile == "whole":
        # unet.compile() would also compile the hooks of the engine, and those of DeepSpeed read the clock
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, backend=backend)
