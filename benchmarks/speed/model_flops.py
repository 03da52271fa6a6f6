"""Floating point operations that a config's network needs, and the rate at which the device multiplies matrices."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import seconds_of_calls

if TYPE_CHECKING:
    from rlcm_fast.config import Config


COUNT = "paper: a product counts once forward and twice backward; attention's backward has no recomputed scores"


def flops_of(config: Config) -> dict[str, float]:
    """FLOP of a transition: forward; paper; executed.

    paper       forward and backward pass, a product's backward pass counted as two such products, attention's too:
                2,407 GFLOP for SD1.5's UNet at 64 x 64 latents, three times its forward pass but for the first layer
    executed    what ran: attention's kernels form the scores again (2.5 times its forward pass), recomputation, and the
                reference's pass
    """
    from rlcm_fast.backbones.loading import resolve_model_path
    from rlcm_fast.planner.architecture import load_architecture
    from rlcm_fast.planner.estimate import DTYPES, strategy_of
    from rlcm_fast.planner.tracing import Setup, prepare_unet, trace_unet

    architecture = load_architecture(resolve_model_path(config.model.path))
    strategy = strategy_of(config, config.model.pixels, architecture.embeds_guidance)
    rows = strategy.rows_per_sample

    def total(recompute: Any) -> tuple[float, float, float]:
        shape = (strategy.lora_rank, strategy.image_size)
        setup = Setup(DTYPES[strategy.dtype], recompute, *shape, text_chunks=strategy.text_chunks)
        unet = prepare_unet(architecture.build_unet(), setup)
        with _attention_flops() as attention:
            traced = trace_unet(unet, architecture, setup, rows, trains=True)
        again = attention.backward - 2 * attention.forward if attention.backward else 0.0
        return traced.forward_flops.total, traced.flops.total, again

    forward, model, again = total("none")
    executed = model if strategy.recompute == "none" else total(strategy.recompute)[1]
    executed += forward if strategy.has_start_model else 0.0
    return {"forward": forward, "paper": model - again, "executed": executed}


def _attention_flops() -> Any:
    """A mode that counts the FLOP of attention's kernels, by torch's formulas: .forward and .backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class AttentionFlops(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.forward = self.backward = 0.0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            name = func.overloadpacket.__name__
            if "attention" in name and func.overloadpacket in flop_registry:
                count = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
                if name.endswith("_backward"):
                    self.backward += count
                else:
                    self.forward += count
            return result

    return AttentionFlops()


def matmul_tflops(config: Config) -> float:
    """The rate of a large square product in the network's precision: the median of ten, after two."""
    import torch

    is_cuda = torch.cuda.is_available()
    dtype = torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16
    size = 8192 if is_cuda else 1024
    matrix = torch.randn(size, size, dtype=dtype, device="cuda" if is_cuda else "cpu")
    times = seconds_of_calls(lambda: matrix @ matrix, 12)[2:]
    return 2 * size**3 / statistics.median(times) / 1e12
