"""Which engine a config asks for."""

from __future__ import annotations

from torch import nn

from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.memory.direct import DirectEngine
from rlcm_fast.memory.engine import Engine
from rlcm_fast.memory.zero import ZeroEngine


def build_engine(
    network: nn.Module,
    engine: EngineConfig,
    optimizer: OptimizerConfig,
    max_grad_norm: float,
    micro_batch_size: int,
    num_micro_batches: int,
    num_updates: int,
) -> Engine:
    """num_micro_batches: of one update and process; num_updates: of the whole run, for the learning rate."""
    if engine.dtype == "pure_bf16" or engine.optimizer_in_backward:
        return DirectEngine(network, engine, optimizer, max_grad_norm, num_micro_batches, num_updates)
    return ZeroEngine(network, engine, optimizer, max_grad_norm, micro_batch_size, num_micro_batches, num_updates)
