"""The optimizer that a config names, and its learning rate over the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.kernels.adamw import AdamW8bit


def build_optimizer(network: nn.Module, config: OptimizerConfig, engine: EngineConfig, seed: int) -> Optimizer:
    """Builds an optimizer of the weights that require gradients.

    seed: seed of stochastic rounding, the same on every process.
    """
    # Collect what all optimizers share.
    parameters = [p for p in network.parameters() if p.requires_grad]
    settings = {
        "lr": config.lr,
        "betas": (config.betas[0], config.betas[1]),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }

    # Build the kind that the config names. The libraries are imported here, because most runs need none of them.
    if engine.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam  # DeepSpeed compiles it at its first use

        return DeepSpeedCPUAdam(parameters, adamw_mode=config.name == "adamw", **settings)
    if config.name in ("bnb_adamw_8bit", "bnb_paged_adamw_8bit"):
        import bitsandbytes.optim

        paged = config.name == "bnb_paged_adamw_8bit"
        kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
        return kind(parameters, **settings)
    if config.name == "adamw_8bit":
        counts = engine.dtype == "pure_bf16"
        return AdamW8bit(parameters, **settings, seed=seed, counts_lost_updates=counts)
    return {"adamw": AdamW, "adam": Adam}[config.name](parameters, **settings)


def load_state(optimizer: Optimizer, parameter: nn.Parameter, saved: Mapping[str, Tensor], step: int | None) -> None:
    """Gives a weight the states of a checkpoint, in their own dtypes; without a step, as before the first update.

    `Optimizer.load_state_dict` would cast 8-bit states to the weight's dtype for a moment, and copy its settings.

    Raises:
        ValueError: another kind of optimizer saved the states.
    """
    # Start as before the first update.
    optimizer.state.pop(parameter, None)
    if step is None:
        return
    state = _first_state(optimizer, parameter)
    if state.keys() - {"step"} != saved.keys():
        kept, found = (", ".join(sorted(names - {"step"})) for names in (state.keys(), saved.keys()))
        raise ValueError(
            f"resume: the checkpoint's optimizer keeps other states ({found}) than this run's optimizer.name ({kept}); "
            "keep the optimizer that it was saved with, or start a new run from its weights"
        )

    # Fill the states in place, so that each keeps its kind of memory.
    if isinstance(optimizer, AdamW8bit):
        optimizer.load_state(parameter, {**saved, "step": step})
        return
    for name, values in saved.items():
        state[name].copy_(values)
    state["step"] = torch.tensor(float(step)) if isinstance(state["step"], Tensor) else step
    optimizer.state[parameter] = state


def _first_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """Returns the states that the optimizer would give a weight in its first step."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.first_state(parameter)
    if type(optimizer).__module__.startswith("bitsandbytes"):
        bitsandbytes: Any = optimizer
        bitsandbytes.init_state(optimizer.param_groups[0], parameter, 0, 0)  # the indices only matter to overrides
        return optimizer.state[parameter]
    step = torch.tensor(0.0) if isinstance(optimizer, (Adam, AdamW)) else 0  # DeepSpeedCPUAdam counts with an int
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def lr_factor(config: OptimizerConfig, num_updates: int) -> Callable[[int], float]:
    """Returns a function from an update's number to a factor on the learning rate.

    The factor warms up linearly and then decays linearly to `final_lr_fraction`.
    """

    def factor(update: int) -> float:
        warmup = min(1.0, (update + 1) / (config.warmup_updates + 1))
        decay = 1.0 - (1.0 - config.final_lr_fraction) * min(1.0, update / max(1, num_updates))
        return warmup * decay

    return factor
