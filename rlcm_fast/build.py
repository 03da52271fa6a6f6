"""The engine that a config asks for, around a UNet that is made ready for it; the start model for the KL term."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config
from rlcm_fast.config.checks import derived
from rlcm_fast.config.sizes import num_pretraining
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.engine.direct import DirectEngine
from rlcm_fast.engine.recomputation import set_recomputation
from rlcm_fast.engine.zero import ZeroEngine


def start_network(backbone: Backbone, config: Config) -> Any:
    """What the KL term takes for the start model's network; None without it. Call it before `build_engine`.

    A copy, or the network itself: it has the start's output without its adapters, or with weights swapped in.
    """
    if config.update.kl_weight == 0:
        return None
    if config.update.kl_reference == "offload":
        return backbone.unet
    start = backbone.frozen_start()
    if config.lora.rank == 0:
        accelerate(start, config.engine)
    return start


def build_engine(unet: Any, config: Config, world_size: int) -> AveragingEngine:
    """Changes the UNet in place: memory format, attention, compilation, recomputation."""
    accelerate(unet, config.engine)
    set_recomputation(unet, config.engine.recompute)
    # DeepSpeed would cast adapters too; as fp32 it leaves every weight in the dtype that it has.
    settings = replace(config.engine, dtype="fp32") if config.lora.rank > 0 else config.engine
    is_direct = settings.dtype == "pure_bf16" or settings.optimizer_in_backward
    numbers = derived(config, world_size)
    engine = (DirectEngine if is_direct else ZeroEngine)(
        unet,
        settings,
        config.optimizer,
        config.update.max_grad_norm,
        config.update.micro_batch_size,
        numbers["micro_batches_per_update_and_process"] + num_pretraining(config, world_size),
        numbers["total_updates"],
        config.seed,
    )
    return AveragingEngine(engine, unet, config.ema)
