"""DeepSpeed behind a few verbs: backward, step, full_weights, save, load.

The engine owns the trained weights, their gradients and the optimizer; what it shares out between processes is the ZeRO
stage. Everything else (VAE, text encoder, rewards, the frozen reference) is plain torch and never partitioned.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed warns that it had to find out
import deepspeed
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from rlcm_fast.config import EngineConfig, OptimizerConfig

_TAG = "deepspeed"


class Engine:
    """The trained network under DeepSpeed; call it like the network."""

    def __init__(
        self,
        network: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        max_grad_norm: float,
        micro_batch_size: int,
        num_micro_batches: int,
        num_updates: int,
    ) -> None:
        """num_micro_batches: of one update and process; num_updates: of the whole run, for the learning rate."""
        torch_optimizer = _build_optimizer(network, optimizer)
        factor = _lr_factor(optimizer.warmup_updates, optimizer.final_lr_fraction, num_updates)
        self.zero_stage = engine.zero_stage
        self._max_grad_norm = max_grad_norm
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch_optimizer,
            lr_scheduler=LambdaLR(torch_optimizer, factor),  # pyright: ignore[reportArgumentType]
            config=_deepspeed_config(engine, max_grad_norm, micro_batch_size, num_micro_batches),
        )

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._engine(*arguments, **keywords)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of a micro-batch's mean loss, divided by the number of micro-batches of an update."""
        self._engine.backward(loss)

    def step(self) -> float | None:
        """Ends a micro-batch; an update's last one takes the optimizer step and returns the norm before clipping."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        norm = self._clip() if self.zero_stage == 0 else None
        self._engine.step()
        return float(self._engine.get_global_grad_norm()) if norm is None else norm

    def _clip(self) -> float:
        """At stage 0 DeepSpeed clips without telling the norm, so we do; ranks have been averaged by now."""
        limit = self._max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit).item()

    @property
    def lr(self) -> float:
        """Of the next update."""
        return self._engine.get_lr()[0]

    def full_weights(self) -> dict[str, Tensor]:
        """All weights on the CPU in float32, gathered under ZeRO-3; every rank must call, the result is the same."""
        module = self._engine.module
        parameters = list(module.parameters()) if self.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3):
            return {name: value.detach().float().cpu().clone() for name, value in module.state_dict().items()}

    def save(self, folder: Path) -> None:
        """Writes weights and optimizer state as DeepSpeed does; every rank must call."""
        self._engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False)

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, with the same number of processes and ZeRO stage."""
        is_there = (folder / _TAG).is_dir()  # else DeepSpeed fails an assertion
        if not is_there or self._engine.load_checkpoint(str(folder), tag=_TAG)[0] is None:
            raise ValueError(f"resume={folder} holds no state that DeepSpeed can read; give another checkpoint")


def init_processes() -> torch.device:
    """Joins the run's processes (gloo on CPU, NCCL on GPUs) and returns this one's device.

    DeepSpeed's shared-memory collective is switched off: on a CPU it would be compiled at first use (26 s, and a
    compiler and ninja on the user's machine), for messages that gloo carries as well.
    """
    deepspeed_logger.setLevel("ERROR")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", deepspeed.comm.get_local_rank())
    torch.cuda.set_device(device)
    return device


def _build_optimizer(network: nn.Module, config: OptimizerConfig) -> Optimizer:
    kind = {"adamw": AdamW, "adam": Adam}[config.name]
    parameters = [p for p in network.parameters() if p.requires_grad]
    return kind(parameters, lr=config.lr, betas=tuple(config.betas), eps=config.eps, weight_decay=config.weight_decay)


def _lr_factor(warmup_updates: int, final_fraction: float, num_updates: int) -> Callable[[int], float]:
    """update number -> factor on the learning rate: linear warm-up, then linear decay to `final_fraction`."""

    def factor(update: int) -> float:
        warmup = min(1.0, (update + 1) / (warmup_updates + 1))
        decay = 1.0 - (1.0 - final_fraction) * min(1.0, update / max(1, num_updates))
        return warmup * decay

    return factor


def _deepspeed_config(
    engine: EngineConfig, max_grad_norm: float, micro_batch_size: int, num_micro_batches: int
) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": num_micro_batches,
        "gradient_clipping": max_grad_norm if engine.zero_stage > 0 else 0.0,
        # stage 3 would replace torch's linear in the whole process: other rounding, also for what it does not own
        "zero_optimization": {"stage": engine.zero_stage, "memory_efficient_linear": False},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
    }
    if engine.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config
