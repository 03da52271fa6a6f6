"""The optimizer that a config names, and its learning rate over the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.optim import Adam, AdamW, Optimizer

from rlcm_fast.config import EngineConfig, OptimizerConfig
from rlcm_fast.kernels.adamw import AdamW8bit

_SET_BY_CONFIG = ("initial_lr", "betas", "eps", "weight_decay")


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


@contextmanager
def settings_kept(optimizer: Optimizer) -> Iterator[None]:
    """Keeps the config's settings while a checkpoint is loaded inside the block, so that a resumed run may change them.

    The optimizer's states come from the checkpoint. The engine that schedules the learning rate sets it afterwards.
    """
    kept = [{key: group[key] for key in _SET_BY_CONFIG if key in group} for group in optimizer.param_groups]
    yield
    for group, settings in zip(optimizer.param_groups, kept, strict=True):
        group.update(settings)


def lr_factor(config: OptimizerConfig, num_updates: int) -> Callable[[int], float]:
    """Returns a function from an update's number to a factor on the learning rate.

    The factor warms up linearly and then decays linearly to `final_lr_fraction`.
    """

    def factor(update: int) -> float:
        warmup = min(1.0, (update + 1) / (config.warmup_updates + 1))
        decay = 1.0 - (1.0 - config.final_lr_fraction) * min(1.0, update / max(1, num_updates))
        return warmup * decay

    return factor
