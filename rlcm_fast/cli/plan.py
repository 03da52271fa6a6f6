"""Tell whether a training config fits on a GPU and how long an iteration takes; needs no GPU, weights or network.

It accepts the config and overrides of train.py. Bytes and FLOPs come from running the model's code on tensors without
memory.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from rlcm_fast.cli.arguments import real, whole
from rlcm_fast.config import bounds
from rlcm_fast.finite_json import finite_json

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.planner.architecture import Size
    from rlcm_fast.planner.estimate import Memory, Strategy
    from rlcm_fast.planner.gpus import Gpu
    from rlcm_fast.planner.remedies import Settings
    from rlcm_fast.planner.seconds import Planner, Seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rlcm-fast plan --config FILE [--gpu NAME] [--section.field VALUE ...]"
    config = "a YAML file or a name of `rlcm-fast configs`, as for train.py, whose --help lists the fields"
    parser.add_argument("--config", action="append", metavar="FILE", help=config)
    parser.add_argument("--gpu", metavar="NAME", help="rtx4090, h100, ... (a wrong name lists all); default: all")
    parser.add_argument("--processes", type=whole(1, bounds.PROCESSES), default=1, help="GPUs of the run")
    size = "pixels per side; default: the size of the model's UNet, which train.py draws"
    parser.add_argument("--image-size", type=whole(1, bounds.PIXELS), metavar="PIXELS", help=size)
    reward = "GiB that reward models of your own need on each GPU; built-in ones are counted"
    parser.add_argument("--reward-gib", type=real(0, bounds.GIB), default=0.0, metavar="GIB", help=reward)
    parser.add_argument("--json", action="store_true", help="bytes and seconds as JSON")


def run(arguments: argparse.Namespace) -> None:
    # Check the arguments before torch is imported.
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate
    from rlcm_fast.planner.gpus import GPUS, find_gpu

    files = [part for file in arguments.config or [] for part in ("--config", file)]
    config = parse_config([*files, *arguments.overrides])
    resolved = validate(config, arguments.processes)
    gpus = [find_gpu(arguments.gpu)] if arguments.gpu is not None else list(GPUS.values())

    # Read the model's configs, build the planner, and choose what the config leaves to it.
    from rlcm_fast.planner.of_config import planner_of

    planner, strategy = planner_of(resolved, arguments.image_size, arguments.reward_gib)
    plans = [_on(config, planner, strategy, gpu) for gpu in gpus]
    are_alike = len({plan.strategy for plan in plans}) == 1
    if arguments.json and not are_alike:
        raise ValueError("gpu=null leaves open what is auto in the config, which the bytes depend on; give --gpu NAME")

    # Print the plan, for programs or for people.
    if arguments.json:
        print(finite_json(_report(planner, plans), indent=2))
        return
    lines = _head(planner, plans, config.model.path)
    lines += _memory_table(planner.memory(plans[0].strategy)) if are_alike else []
    print("\n".join(lines))
    print("\n".join(_one_gpu(planner, plans[0]) if len(plans) == 1 else _all_gpus(planner, plans)))


@dataclass(frozen=True)
class _OnGpu:
    """A config on a GPU; nothing is auto but graphs that have room."""

    gpu: Gpu
    config: Config
    strategy: Strategy
    choices: Sequence[str] = ()  # what became of auto beside the micro-batches, and why


def _on(config: Config, planner: Planner, strategy: Strategy, gpu: Gpu) -> _OnGpu:
    """Chooses what the config leaves to the planner, for engine.memory_gib or all that the GPU has."""
    from rlcm_fast.config.batches import Candidates, is_open
    from rlcm_fast.planner.batches import choices, choose, chosen_config

    if not is_open(config):
        return _OnGpu(gpu, config, strategy)
    candidates = Candidates.of(config, planner.workload.num_processes)
    chosen, _ = choose(planner, strategy, candidates, config.engine.memory_gib or gpu.memory_gib)
    return _OnGpu(gpu, chosen_config(config, chosen), chosen, choices(planner, strategy, chosen, candidates))


def _head(planner: Planner, plans: Sequence[_OnGpu], name: str) -> list[str]:
    strategy = plans[0].strategy
    unet, work = planner.profiles(strategy).unet, planner.workload
    millions = (sum(unet.trainable) + unet.frozen) / 1e6
    shown = ", ".join(_shown(size) for size in planner.sizes or [strategy.image_size])
    images = f"{work.samples} images of {shown} pixels"
    sizes = f"of {strategy.rollout_micro_batch_size} (rollout) and {strategy.micro_batch_size} (update)"
    numbers = {(plan.strategy.rollout_micro_batch_size, plan.strategy.micro_batch_size) for plan in plans}
    sizes = sizes if len(numbers) == 1 else "as each GPU has room for"
    several = ["several sizes: bytes and GFLOP are those of the largest, seconds the mean"] if planner.sizes else []
    of = "" if work.num_processes == 1 else f" on each of {work.num_processes} GPUs"
    return [
        f"{name}: UNet of {millions:.1f} M parameters, {unet.forward_flops.total / 1e9:.4g} GFLOP forward, "
        f"{unet.training_flops.total / 1e9:.5g} with backward",
        f"an iteration{of}: {images}, {work.num_steps} steps each, {work.samples * work.num_trained} transitions; "
        f"micro-batches {sizes}",
        *several,
        "",
    ]


def _shown(size: Size | None) -> str:
    return " x ".join(map(str, size)) if isinstance(size, tuple) else str(size)


_WORDS = {
    "weights": "weights of the UNet",
    "master": "float32 master copy",
    "moments": "optimizer states",
    "vae": "VAE",
    "text_encoders": "text encoders",
    "start_model": "copy of the start model (KL)",
    "ema": "EMA copy",
    "rewards": "reward models",
    "offloaded_rewards": "reward models (rollout)",
    "bucket": "DeepSpeed's bucket",
    "second_gradients": "gradients returned at once",
    "graph_copies": "copies for graphs",
    "activations": "activations (update)",
    "sampling": "activations (sampling)",
    "decoding": "activations (decoding)",
    "encoding_images": "activations (real images)",
    "step_temporaries": "temporaries of the step",
    "overhead": "CUDA and allocator, a guess",
}
_LEFT_OUT = "rewards and texts are not counted"


def _memory_table(memory: Memory) -> list[str]:
    shown = {_WORDS.get(name, name): size for name, size in memory.parts().items() if size > 0}
    if memory.graph_pool > 0:
        shown["kept by graphs"] = memory.graph_pool  # of the activations above
    shown |= {f"peak of {stage}": size for stage, size in memory.stages.items()}
    return ["GiB on each GPU", *(f"  {name:<28}{_gib(size):>8}" for name, size in shown.items()), ""]


def _one_gpu(planner: Planner, plan: _OnGpu) -> list[str]:
    gpu, strategy = plan.gpu, plan.strategy
    seconds = planner.seconds(strategy, gpu)
    stages = ", ".join(f"{name} {getattr(seconds, name):.3g}" for name in ("sampling", "decoding", "update", "step"))
    return [
        f"{gpu.name}: {gpu.memory_gib:g} GiB, {gpu.bandwidth_gb_s:g} GB/s, {gpu.bf16_tflop_s:g} TFLOP/s bf16, "
        f"{gpu.tf32_tflop_s:g} TF32, {gpu.fp32_tflop_s:g} float32 ({gpu.source})",
        f"  seconds per iteration: {seconds.iteration:.3g} ({stages}); {_trust(gpu.name)}; {_LEFT_OUT}",
        f"  hours of the whole run: {_hours(plan, seconds):.3g} ({plan.config.num_iterations} iterations, without "
        "evaluations and checkpoints)",
        *_rewards(planner, gpu),
        *_not_known(planner, strategy),
        *(f"  {line}" for line in plan.choices),
        *(f"  {line}" for line in _verdict(planner, plan)),
    ]


def _hours(plan: _OnGpu, seconds: Seconds) -> float:
    return seconds.iteration * plan.config.num_iterations / 3600


def _trust(gpu: str) -> str:
    """Says how far the seconds can be trusted."""
    from rlcm_fast.planner.efficiency import ERROR, MEASURED_ON

    fitted = f"fitted to an {MEASURED_ON} without torch.compile, {ERROR:.0%} off at most there"
    return fitted if gpu == MEASURED_ON else f"an estimate by the efficiency of an {MEASURED_ON}, not measured"


def _rewards(planner: Planner, gpu: Gpu) -> list[str]:
    seconds = planner.reward_seconds(gpu)
    return [f"  built-in rewards on this GPU: {seconds:.3g} s of it at most, beside the sampling"] if seconds else []


def _not_known(planner: Planner, strategy: Strategy) -> list[str]:
    """Says which of the numbers are those of the worse of two cases."""
    lines = []
    if planner.tries_half(strategy):
        half = planner.memory(replace(strategy, vae_dtype="fp16"))
        lines.append(
            "  decoding: the run tries float16, whose seconds these are; GiB are those of float32, the worst case "
            f"(activations in float16: {_gib(half.decoding)})"
        )
    if strategy.compile == "whole":
        lines.append(
            "  engine.compile=whole: activations are those of the uncompiled network, which a count on a CPU makes an "
            "upper bound; no GPU has measured it"
        )
    return lines


def _verdict(planner: Planner, plan: _OnGpu) -> list[str]:
    from rlcm_fast.planner.estimate import GIB
    from rlcm_fast.planner.remedies import Remedies

    gpu, strategy = plan.gpu, plan.strategy
    memory = planner.memory(strategy)
    stage = max(memory.stages, key=lambda name: memory.stages[name])
    of_total = f"{_gib(memory.peak)} of {gpu.memory_gib:g} GiB, at its peak in {stage}"
    update, rollout = planner.largest_micro_batch(strategy, gpu), planner.largest_rollout_micro_batch(strategy, gpu)
    largest = f"largest micro-batches that fit: {rollout or 'none'} (rollout), {update or 'none'} (update)"
    if memory.peak <= gpu.memory_gib * GIB:
        return [f"it fits: {of_total}", largest]
    return [
        f"it does not fit: {of_total}",
        largest,
        _remedy(Remedies(planner, plan.config, strategy.image_size, gpu).cheaper()),
    ]


def _remedy(settings: Settings | None) -> str:
    if settings is None:
        return "no setting of this version makes it fit; use a larger GPU, or more GPUs with ZeRO"
    options = " ".join(f"--{field} {str(value).lower()}" for field, value in settings.items())
    return f"it would fit with {options}"


def _all_gpus(planner: Planner, plans: Sequence[_OnGpu]) -> list[str]:
    from rlcm_fast.planner.efficiency import MEASURED_ON

    # Write a row for each GPU.
    lines = [
        f"{'GPU':<12}{'GiB':>5}{'fits':>6}{'micro-batches':>17}{'s/iteration':>13}   sampling  decoding  update  hours"
    ]
    for plan in plans:
        gpu, strategy = plan.gpu, plan.strategy
        seconds = planner.seconds(strategy, gpu)
        rollout = planner.largest_rollout_micro_batch(strategy, gpu)
        largest = f"{rollout or '-'}, {planner.largest_micro_batch(strategy, gpu) or '-'}"
        fits = "yes" if planner.fits(strategy, gpu) else "no"
        lines.append(
            f"{gpu.name:<12}{gpu.memory_gib:>5g}{fits:>6}{largest:>17}{seconds.iteration:>13.3g}"
            f"{seconds.sampling:>11.3g}{seconds.decoding:>10.3g}{seconds.update:>8.3g}{_hours(plan, seconds):>7.3g}"
        )
    # Explain the columns below them.
    return [
        *lines,
        "",
        "micro-batches: the largest that fit, rollout and update",
        f"seconds: {_trust(MEASURED_ON)}; of others estimates by the same efficiency; {_LEFT_OUT}",
        f"hours: all {plans[0].config.num_iterations} iterations",
        "--gpu NAME says what to change if it does not fit",
    ]


def _report(planner: Planner, plans: Sequence[_OnGpu]) -> dict[str, Any]:
    memory = planner.memory(plans[0].strategy)
    return {
        "bytes": memory.parts(),
        "peak_bytes": memory.stages,
        "gpus": {plan.gpu.name: _report_of(planner, plan) for plan in plans},
    }


def _report_of(planner: Planner, plan: _OnGpu) -> dict[str, Any]:
    from rlcm_fast.planner.remedies import Remedies

    gpu, strategy = plan.gpu, plan.strategy
    fits, seconds = planner.fits(strategy, gpu), planner.seconds(strategy, gpu)
    stages = ("sampling", "decoding", "update", "step", "iteration")
    return {
        "fits": fits,
        "memory_gib": gpu.memory_gib,
        "micro_batch_size": strategy.micro_batch_size,
        "rollout_micro_batch_size": strategy.rollout_micro_batch_size,
        "decode_batch_size": strategy.decode_batch_size,
        "largest_micro_batch": planner.largest_micro_batch(strategy, gpu),
        "largest_rollout_micro_batch": planner.largest_rollout_micro_batch(strategy, gpu),
        "seconds": {name: getattr(seconds, name) for name in stages} | {"rewards": planner.reward_seconds(gpu)},
        "hours": _hours(plan, seconds),
        "seconds_are": _trust(gpu.name),
        "cheaper": None if fits else Remedies(planner, plan.config, strategy.image_size, gpu).cheaper(),
    }


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f}"
