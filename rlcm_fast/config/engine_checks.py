"""Refuses settings of the engine and the optimizer that do not go together, with the reason."""

from __future__ import annotations

from importlib.util import find_spec

from rlcm_fast.config import Config, EngineConfig
from rlcm_fast.config.resolved import ResolvedRun

_8BIT = ("adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit")


def check_engine(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" for the first two settings that exclude each other."""
    config = run.config
    _check_dtype(config)
    _check_optimizer(config)
    _check_offload(config)
    _check_in_backward(run)
    _check_network(config)
    _check_graphs(run)
    if config.ema.decay > 0 and config.engine.zero_stage == 3:
        raise ValueError(
            f"ema.decay={config.ema.decay} needs whole weights on each process; set engine.zero_stage to 2 or less, or "
            "ema.decay=0"
        )


def _check_dtype(config: Config) -> None:
    engine, optimizer = config.engine, config.optimizer
    if engine.dtype == "bf16" and engine.zero_stage == 0 and config.lora.rank == 0:  # adapters are float32
        raise ValueError(
            "engine.dtype=bf16 needs engine.zero_stage >= 1: at stage 0 DeepSpeed takes a dummy optimizer step at "
            "start, which puts Adam's bias correction off by one; set engine.zero_stage=1 (the same on one process)"
        )
    if engine.dtype == "pure_bf16" and engine.zero_stage > 0 and config.lora.rank == 0:
        raise ValueError(
            f"engine.dtype=pure_bf16 has no master weights for engine.zero_stage={engine.zero_stage} to share out; "
            "set engine.zero_stage=0, or engine.dtype=bf16"
        )
    if engine.dtype == "pure_bf16" and optimizer.name != "adamw_8bit" and config.lora.rank == 0:
        raise ValueError(
            f"optimizer.name={optimizer.name} would lose updates below the last digit of pure_bf16 weights; set "
            "optimizer.name=adamw_8bit, which rounds stochastically"
        )


def _check_optimizer(config: Config) -> None:
    engine, optimizer = config.engine, config.optimizer
    if optimizer.name == "adam" and optimizer.weight_decay > 0:
        raise ValueError(
            f"optimizer.weight_decay={optimizer.weight_decay} is not decoupled in adam; set optimizer.name=adamw"
        )
    if optimizer.name in _8BIT and engine.zero_stage == 3:
        raise ValueError(
            f"optimizer.name={optimizer.name} has states of blocks that engine.zero_stage=3 would cut; set "
            "engine.zero_stage=2, or optimizer.name=adamw"
        )


def _check_offload(config: Config) -> None:
    engine, optimizer = config.engine, config.optimizer
    if not engine.offload_optimizer:
        return
    if engine.zero_stage == 0:
        raise ValueError("engine.offload_optimizer=true is a part of ZeRO; set engine.zero_stage=1 or more")
    if optimizer.name in _8BIT:
        raise ValueError(
            f"optimizer.name={optimizer.name} steps on the GPU, where engine.offload_optimizer=true leaves no states; "
            "set optimizer.name=adamw, or engine.offload_optimizer=false"
        )


def _check_in_backward(run: ResolvedRun) -> None:
    config, sizes = run.config, run.sizes
    engine, optimizer, update = config.engine, config.optimizer, config.update
    if not engine.optimizer_in_backward:
        return

    # Only one engine and one optimizer step weight by weight.
    if engine.zero_stage > 0:
        raise ValueError(
            f"engine.optimizer_in_backward=true leaves engine.zero_stage={engine.zero_stage} no gradients to share "
            "out; set engine.zero_stage=0"
        )
    if optimizer.name != "adamw_8bit":
        raise ValueError(
            f"optimizer.name={optimizer.name} steps all weights at once, engine.optimizer_in_backward=true one by one; "
            "set optimizer.name=adamw_8bit"
        )

    # Weights move during the backward pass, so an update has only one.
    if config.pretraining.weight > 0:
        raise ValueError(
            "engine.optimizer_in_backward=true moves weights in the backward pass, so an update must be one, and "
            f"pretraining.weight={config.pretraining.weight} adds another; set one of the two to 0 or false"
        )
    if sizes.micro_batches_per_update_and_process > 1:
        rows = sizes.transitions_per_update // sizes.num_processes
        fewer = update.num_updates * sizes.micro_batches_per_update_and_process
        raise ValueError(
            f"engine.optimizer_in_backward=true moves weights in the backward pass, so an update must be one: its "
            f"{rows} transitions a process do not fit update.micro_batch_size={update.micro_batch_size}; set "
            f"update.micro_batch_size={rows} (with engine.recompute=block), or update.num_updates={fewer}"
        )


def compile_problem(engine: EngineConfig, mode: str) -> str:
    """Says why the network cannot be compiled in this way, and the way out; empty if it can."""
    if mode != "off" and engine.zero_stage == 3:
        return (
            f"engine.compile={mode} makes whole graphs, which the hooks of engine.zero_stage=3 would break; set "
            "engine.compile=off, or engine.zero_stage=2"
        )
    if mode == "whole" and engine.optimizer_in_backward:
        return (
            "engine.compile=whole returns the gradients of all weights at once, which engine.optimizer_in_backward="
            "true is to avoid; set engine.compile=regional"
        )
    return ""


def attention_problem(engine: EngineConfig, kind: str) -> str:
    """Says why attention of this kind cannot be used, and the way out; empty if it can, as far as a config shows."""
    if kind == "xformers" and engine.deterministic:
        return (
            "engine.attention=xformers sums gradients in no fixed order, so engine.deterministic=true cannot be kept; "
            "set engine.attention=sdpa"
        )
    if kind == "xformers" and find_spec("xformers") is None:
        return (
            "engine.attention=xformers needs the package xformers, which is not installed: pip install "
            "'rlcm_fast[xformers]'; or set engine.attention=sdpa"
        )
    return ""


def _check_network(config: Config) -> None:
    # What cannot work with partitioned or flattened weights; auto chooses what can.
    engine, optimizer = config.engine, config.optimizer
    problem = "" if engine.compile == "auto" else compile_problem(engine, engine.compile)
    if problem:
        raise ValueError(problem)

    # What another package undoes, or does not bring.
    if engine.channels_last and engine.zero_stage == 0 and optimizer.name.startswith("bnb_"):
        raise ValueError(
            f"optimizer.name={optimizer.name} makes channels_last weights contiguous at its first step, so "
            "engine.channels_last=true would be lost; set optimizer.name=adamw_8bit, which keeps them"
        )
    problem = attention_problem(engine, engine.attention)
    if problem:
        raise ValueError(problem)


def _check_graphs(run: ResolvedRun) -> None:
    # With engine.graphs=auto the same are left out, and the run says so.
    engine, remedy = run.config.engine, "set engine.graphs=auto, which leaves out what cannot"
    if engine.graphs != "on":
        return
    if engine.dtype != "pure_bf16" or run.config.lora.rank > 0:
        raise ValueError(
            "engine.graphs=on replays updates, for which gradients must stay in one place: DeepSpeed sets them to None "
            "after each step, and its hooks do not run on replay; set engine.dtype=pure_bf16 and lora.rank=0, or "
            "engine.graphs=auto, which leaves out what cannot"
        )
    if engine.optimizer_in_backward:
        raise ValueError(
            "engine.graphs=on cannot replay the steps of engine.optimizer_in_backward=true, whose learning rate and "
            f"random numbers are the host's; {remedy}"
        )
    if engine.offload_idle is True:
        raise ValueError(
            f"engine.graphs=on replays decoding, and engine.offload_idle=true moves the VAE each time; {remedy}"
        )
