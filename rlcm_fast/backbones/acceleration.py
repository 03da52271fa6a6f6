"""How the network's passes run: memory format, attention, torch.compile. Weights and their names stay as they are."""

from __future__ import annotations

from typing import Any

import torch

from rlcm_fast.config import EngineConfig

_MAX_GRAPHS = 128  # torch's 8 are of all blocks together, and SD 1.5 has blocks of four shapes


def check_device(engine: EngineConfig, device: torch.device) -> None:
    """ValueError for what is known to go wrong on a device, before weights load."""
    if engine.compile == "whole" and device.type == "cpu":
        raise ValueError(
            "engine.compile=whole has wrong gradients on CPUs for some networks (seen with torch 2.13 and a UNet "
            "of 8 and 16 channels, whose outputs were right); set engine.compile=regional or off"
        )


def accelerate(unet: Any, engine: EngineConfig, backend: str = "inductor") -> None:
    """In place, before the engine takes the UNet.

    torch.compile makes a graph for each shape and for passes with and without gradients, at their first use; graphs
    are kept between runs in torch's cache on the disk. `backend` is for tests.
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
        # not unet.compile(): that takes in the hooks of an engine around it, and DeepSpeed's read the clock
        unet.forward = torch.compile(unet.forward, fullgraph=True, dynamic=False, backend=backend)
