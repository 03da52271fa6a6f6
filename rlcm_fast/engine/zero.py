"""The engine over DeepSpeed: ZeRO 0 to 3, float32 master weights, and the optimizer's state on the CPU if asked.

Gradients of several micro-batches add up in float32, also those of a bfloat16 network: in bfloat16 1,024 equal ones
would lose 62 % of their sum, because a sum of 256 no longer changes by 1 (docs/memory.md).
"""

from __future__ import annotations

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # without it, DeepSpeed warns that it guesses
import deepspeed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rlcm_fast import parallel
from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.engine.base import Engine, UpdatePlan, are_finite, copied_to_cpu, gradient_fails_with
from rlcm_fast.engine.old_checkpoints import read_engine
from rlcm_fast.engine.optimizers import build_optimizer, lr_factor
from rlcm_fast.engine.replicas import load_replica, save_replica
from rlcm_fast.engine.resharding import load_partition, save_partition

_COUNTERS = ("global_steps", "global_samples", "skipped_steps")  # of DeepSpeed's engine
_MOST_NORM = math.sqrt(torch.finfo(torch.float32).max)


class ZeroEngine(Engine):
    """Trains a network under DeepSpeed."""

    def __init__(
        self,
        network: nn.Module,
        engine: EngineConfig,
        optimizer: OptimizerConfig,
        plan: UpdatePlan,
        seed: int,
    ) -> None:
        """Takes `network` over; `seed` is used by an optimizer that rounds stochastically."""
        # Build the optimizer and its learning rate's schedule.
        _refuse_large_partitions(network, optimizer.name, engine.zero_stage)
        torch_optimizer = build_optimizer(network, optimizer, engine, seed)
        self._optimizer, self._base_lr = torch_optimizer, optimizer.lr
        self._factor = lr_factor(optimizer, plan.num_updates)
        self.zero_stage = engine.zero_stage
        self._max_grad_norm = plan.max_grad_norm

        # Hand the network to DeepSpeed, contiguous: DeepSpeed 0.19.8 broadcasts the start weights as bytes, and torch
        # refuses to view channels_last tensors as bytes.
        module: Any = network
        module.to(memory_format=torch.contiguous_format)
        self._engine: Any
        self._engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=torch_optimizer,
            lr_scheduler=LambdaLR(torch_optimizer, self._factor),  # pyright: ignore[reportArgumentType]
            config=_deepspeed_config(engine, plan),
        )
        if self.zero_stage == 0 and parallel.world_size() == 1:
            self._engine.enable_backward_allreduce = False  # it copies all gradients to a flat buffer and back
        if _sums_in_float32(engine, plan) and not _config_sums_in_float32(engine):
            _sum_in_float32(self._engine.optimizer)
        if self.zero_stage == 3:
            _bound_norms(self._engine.optimizer)
        if engine.channels_last and self.zero_stage == 0:
            module.to(memory_format=torch.channels_last)
        self._num_micro_batches = self._num_left = plan.num_micro_batches
        self.begin_update(plan.num_micro_batches)

    def begin_update(self, num_micro_batches: int) -> None:
        self._num_micro_batches = self._num_left = num_micro_batches
        self._engine.set_gradient_accumulation_boundary(num_micro_batches == 1)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._engine(*arguments, **keywords)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(gradient_fails_with(loss), scale_wrt_gas=False)

    @property
    def graph_problem(self) -> str:
        return "DeepSpeed sets gradients to None after each step, and its hooks do not run when a graph is replayed"

    def step(self) -> float | None:
        self._num_left -= 1
        if self._num_left > 0:
            self._engine.step()
            self._engine.set_gradient_accumulation_boundary(self._num_left == 1)
            return None
        norm = self._step_whole() if self.zero_stage == 0 else self._step_partitioned()
        self.begin_update(self._num_micro_batches)
        return norm

    def _step_whole(self) -> float:
        """Steps at stage 0 and returns the norm; without gradients optimizers do nothing, and the schedule goes on."""
        norm = self._clip()
        if not math.isfinite(norm):
            self._engine.zero_grad()
        self._engine.step()
        return norm

    def _step_partitioned(self) -> float:
        """Steps at stages 1 to 3 and returns the norm.

        DeepSpeed 0.19.8 reads the norm over all processes, skips a step whose norm is not finite, and sets `overflow`.
        It then leaves out the schedule's step too, which is made up here: schedules are the same for every engine.
        """
        self._engine.step()
        if self._engine.optimizer.overflow:
            if self.zero_stage < 3:  # with offload DeepSpeed 0.19.8 keeps the float32 sums, and adds the next to them
                sums = self._engine.optimizer.averaged_gradients
                sums.update(dict.fromkeys(sums))
            with warnings.catch_warnings():  # torch expects that no update is skipped before the first step
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                self._engine.lr_scheduler.step()
            return math.inf
        return float(self._engine.get_global_grad_norm())

    def _clip(self) -> float:
        """Clips the gradients, averaged over ranks by now, and returns their norm: at stage 0 DeepSpeed hides it."""
        limit = self._max_grad_norm or float("inf")
        return torch.nn.utils.clip_grad_norm_(self._engine.module.parameters(), limit).item()

    @property
    def lr(self) -> float:
        return self._engine.get_lr()[0]

    def weights_are_finite(self) -> bool:
        trained = [weight for weight in self._engine.module.parameters() if weight.requires_grad]
        return are_finite([weight.ds_tensor for weight in trained] if self.zero_stage == 3 else trained)

    def full_weights(self) -> dict[str, Tensor]:
        module = self._engine.module
        parameters = list(module.parameters()) if self.zero_stage == 3 else []
        with deepspeed.zero.GatheredParameters(parameters, enabled=self.zero_stage == 3):
            return copied_to_cpu(module)

    def save(self, folder: Path) -> None:
        counters = {name: getattr(self._engine, name) for name in _COUNTERS}
        counters["schedule"] = self._engine.lr_scheduler.last_epoch
        if self.zero_stage == 0:
            save_replica(folder, self._engine.module, self._optimizer, counters)
        else:
            save_partition(folder, self._engine, counters)

    def load(self, folder: Path, trusts_old: bool = False) -> None:
        # Restore weights and states.
        saved = read_engine(folder, self._engine.module, trusts_old)
        if self.zero_stage == 0:
            load_replica(self._engine.module, self._optimizer, saved)
        else:
            load_partition(self._engine, saved)

        # Go on with the schedule from the same update, at this run's learning rate.
        for name in _COUNTERS:
            setattr(self._engine, name, saved.counters.get(name, saved.counters["schedule"]))
        scheduler, update = self._engine.lr_scheduler, saved.counters["schedule"]
        scheduler.last_epoch, scheduler._step_count = update, update + 1
        lr = self._base_lr * self._factor(update)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        scheduler._last_lr = [lr] * len(scheduler.base_lrs)


def _bound_norms(optimizer: Any) -> None:
    """Makes a norm infinite if its square is, as it is at stages 0 to 2.

    DeepSpeed 0.19.8 computes the norms of stage 3 in float64. A gradient beyond 2^64 would pass, and its square, which
    is infinite in Adam's float32, would stop its weights for good without a word.
    """
    norms_of_groups = optimizer._get_norm_groups

    def bounded() -> list[Tensor]:
        return [torch.where(norm < _MOST_NORM, norm, torch.inf) for norm in norms_of_groups()]

    optimizer._get_norm_groups = bounded


def _refuse_large_partitions(network: nn.Module, optimizer: str, zero_stage: int) -> None:
    """Refuses more weights per process than bitsandbytes can count.

    It counts a tensor's elements in 32 bits, and under ZeRO 1 and 2 all weights of a process are one tensor.
    """
    numel = sum(p.numel() for p in network.parameters() if p.requires_grad) // parallel.world_size()
    if optimizer.startswith("bnb_") and zero_stage in (1, 2) and numel >= 2**31:
        raise ValueError(
            f"optimizer.name={optimizer} allows fewer than 2^31 weights per process under engine.zero_stage="
            f"{zero_stage}, but there are {numel:,}; set optimizer.name=adamw_8bit, or use more processes"
        )


def _deepspeed_config(engine: EngineConfig, plan: UpdatePlan) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        # DeepSpeed only needs to know whether there are several; `begin_update` sets how many.
        "gradient_accumulation_steps": min(2, plan.num_micro_batches),
        "gradient_clipping": plan.max_grad_norm if engine.zero_stage > 0 else 0.0,
        # Stage 3 would replace torch's linear in the whole process, which rounds differently, even outside the engine.
        "zero_optimization": {
            "stage": engine.zero_stage,
            "memory_efficient_linear": False,
            "offload_optimizer": {"device": "cpu" if engine.offload_optimizer else "none", "pin_memory": True},
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every forward pass
    }
    if engine.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    if _sums_in_float32(engine, plan) and _config_sums_in_float32(engine):
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config


def _sums_in_float32(engine: EngineConfig, plan: UpdatePlan) -> bool:
    """Tells whether bfloat16 gradients of several micro-batches must be added up in float32."""
    return engine.dtype == "bf16" and plan.num_micro_batches > 1


def _config_sums_in_float32(engine: EngineConfig) -> bool:
    """Tells whether DeepSpeed 0.19.8 does it by its config with the optimizer that it has otherwise.

    At stage 1 without offload it would take another one, BF16_Optimizer, whose checkpoints have another format and
    which keeps float32 gradients of all weights all the time.
    """
    return engine.zero_stage != 1 or engine.offload_optimizer


def _sum_in_float32(optimizer: Any) -> None:
    """Makes the optimizer of stage 1 add up gradients in float32, as DeepSpeed does with offload.

    It reads these attributes in every backward pass, and nothing that it builds before depends on them.
    """
    optimizer.gradient_accumulation_dtype = torch.float32
    optimizer.use_separate_grad_accum = optimizer.use_grad_accum_attribute = True
