"""Floating point operations that a config's network needs, and the rate at which the device multiplies matrices."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import seconds_of_calls

if TYPE_CHECKING:
    from rlcm_fast.config import Config


def flops_of(config: Config) -> dict[str, float]:
    """FLOP of a transition: forward; model (forward, backward); executed (recomputation, the reference's pass too)."""
    from rlcm_fast.backbones.loading import resolve_model_path
    from rlcm_fast.planner.architecture import load_architecture
    from rlcm_fast.planner.estimate import DTYPES, strategy_of
    from rlcm_fast.planner.tracing import Setup, prepare_unet, trace_unet

    architecture = load_architecture(resolve_model_path(config.model.path))
    strategy = strategy_of(config, config.model.pixels, architecture.embeds_guidance)
    rows = strategy.rows_per_sample

    def total(recompute: Any) -> tuple[float, float]:
        shape = (strategy.lora_rank, strategy.image_size)
        setup = Setup(DTYPES[strategy.dtype], recompute, *shape, text_chunks=strategy.text_chunks)
        traced = trace_unet(prepare_unet(architecture.build_unet(), setup), architecture, setup, rows, trains=True)
        return traced.forward_flops.total, traced.flops.total

    forward, model = total("none")
    executed = model if strategy.recompute == "none" else total(strategy.recompute)[1]
    return {"forward": forward, "model": model, "executed": executed + (forward if strategy.has_start_model else 0.0)}


def matmul_tflops(config: Config) -> float:
    """The rate of a large square product in the network's precision: the median of ten, after two."""
    import torch

    is_cuda = torch.cuda.is_available()
    dtype = torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16
    size = 8192 if is_cuda else 1024
    matrix = torch.randn(size, size, dtype=dtype, device="cuda" if is_cuda else "cpu")
    times = seconds_of_calls(lambda: matrix @ matrix, 12)[2:]
    return 2 * size**3 / statistics.median(times) / 1e12
