"""An iteration of a full-size model with random weights: seconds by stage, MFU, GPU-busy share, noise, inference.

    python benchmarks/speed/bench_full_size.py --out FOLDER  # on a GPU: SD1.5 LCM, every weight, 512 x 512
    python benchmarks/speed/bench_full_size.py --config configs/shapes/compressibility.yaml --modes off --out FOLDER

For each of --modes (engine.compile), in one process:

 iteration   a full iteration of the trainer beside its bare network passes, as in bench_iteration.py: medians and
             quartiles (_q1, _q3) of --pairs after a warm-up, of --samples images (the config's own number is scaled
             from it and said to be)
 sampling,   seconds of the device in these stages of the same iterations (device_clock.py); update with its steps
 decode,
 update
 matmul      the rate of a large matrix product in the same precision, measured beside each of these iterations
 MFU         floating point operations of the paper count (model_flops.py: 2,407 GFLOP a transition of SD1.5's UNet at
             64 x 64 latents, forward and backward) in the update's or sampling's seconds, over that rate
 HFU         what ran: scores that attention's backward pass forms again, recomputation, the KL term's forward pass
 GPU busy    the share in which a kernel ran, of one more iteration and of each of its stages, by torch.profiler
             (`--profile` of train.py); on a GPU
 ratio       abs(ratio - 1) of a rollout's transitions under unchanged weights, in training's micro-batches and graphs:
             what rounding does; 1e-4 is the clip range
 inference   --inference-steps and the decode, milliseconds an image

and for each of --micro-batch-sizes images/s and peak memory of full iterations, uncompiled. Writes OUT/full_size.csv,
full_size_stages.csv, full_size_micro_batches.csv, full_size_inference.csv and full_size.json, whose content is also the
last line on stdout, anew after each mode and size, so that a run that is cut off leaves those that had ended. What it
had not come to, or what had not begun by --seconds, is named under left_out.

A slice of a few minutes is a mode or a size by itself; it keeps the rows that OUT has of other modes and sizes, if they
are of the same config, overrides, number of images and machine:

    python benchmarks/speed/bench_full_size.py --out FOLDER --samples 32 --modes off --micro-batch-sizes
    python benchmarks/speed/bench_full_size.py --out FOLDER --samples 32 --modes whole --micro-batch-sizes
    python benchmarks/speed/bench_full_size.py --out FOLDER --samples 32 --modes --micro-batch-sizes 16 32
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import BarePasses, policy_of, seconds_of_calls
from benchmarks.shared.device_clock import DeviceClock
from benchmarks.shared.reporting import percentile, print_summary, write_csv
from benchmarks.shared.training_runs import add_config_arguments, read_config, temporary_trainer
from benchmarks.speed.bench_iteration import (
    NOTHING_BESIDES,
    median_of,
    pair,
    run_with_hook,
    throughput,
    with_micro_batches,
)
from benchmarks.speed.full_size_tables import TABLES, earlier_rows, put_rows
from benchmarks.speed.model_flops import COUNT, flops_of, matmul_tflops

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

_MODES = ("off", "regional", "whole")


def main() -> int:
    # One process, which DeepSpeed need not look for.
    arguments = _parser().parse_args()
    from rlcm_fast.train import set_process_environment

    set_process_environment()

    # Write anew after each mode and size: a run that is cut off leaves those that had ended.
    try:
        config = _config(arguments)
        import torch

        from benchmarks.shared.random_models import random_weights

        with random_weights("cuda" if torch.cuda.is_available() else "cpu"):
            for summary in measure(config, arguments):
                for name, (key, _) in TABLES.items():
                    write_csv(arguments.out / f"full_size{name}.csv", summary[key])
                print_summary(summary, arguments.out / "full_size.json")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/sd15_lcm/full_24gb.yaml")
    parser.add_argument("--modes", nargs="*", choices=_MODES, default=["off", "whole"], help="of engine.compile")
    parser.add_argument("--samples", type=int, default=64, help="images of a measured iteration (default 64)")
    parser.add_argument("--pairs", type=int, default=5, help="measured iterations of a mode (default 5)")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument("--inference-steps", type=int, nargs="*", default=[2, 4, 8], metavar="N")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    config = read_config(arguments, *NOTHING_BESIDES, "--tracking.tensorboard=false")
    per_prompt = config.prompts.images_per_prompt
    if arguments.pairs < 1 or arguments.samples % per_prompt:
        raise ValueError(
            f"pairs={arguments.pairs}, samples={arguments.samples}: give at least one pair, and samples that divide by "
            f"prompts.images_per_prompt={per_prompt}"
        )
    if config.engine.zero_stage > 0 or config.engine.optimizer_in_backward:
        raise ValueError("the bare passes know engine.zero_stage=0 without engine.optimizer_in_backward; set these")
    return config


def measure(config: Config, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The summary, again and again as it grows, in the order of what matters most."""
    # What is to come, and what it is compared with.
    deadline = time.monotonic() + arguments.seconds
    samples, flops = _numbered(_scaled(config, arguments.samples), arguments.out), flops_of(config)
    images = config.prompts.num_prompts * config.prompts.images_per_prompt
    left_out = [f"engine.compile={mode}" for mode in arguments.modes]
    left_out += [f"micro-batches of {size}" for size in arguments.micro_batch_sizes]
    summary: dict[str, Any] = {"config": arguments.config, "override": list(arguments.override)}
    summary |= {"samples": arguments.samples, "flops_count": COUNT}
    summary["gflop_per_transition"] = {name: count / 1e9 for name, count in flops.items()}
    earlier = earlier_rows(arguments.out / "full_size.json", summary)
    summary |= {**earlier, "left_out": left_out}
    eager = replace(samples, engine=replace(samples.engine, compile="off"))
    for size in arguments.micro_batch_sizes:
        with_micro_batches(eager, size)  # a size that does not divide is found before minutes are spent

    # Iterations and inference in each mode.
    for mode in arguments.modes:
        if time.monotonic() > deadline:
            break
        compiled = replace(samples, engine=replace(samples.engine, compile=mode))
        row, stages = _mode(compiled, arguments, flops, summary)
        row[f"seconds_of_{images}_scaled"] = row["full_seconds"] * images / arguments.samples
        put_rows(summary, "modes", [row])
        put_rows(summary, "stages", stages)
        left_out.pop(0)
        yield summary

    # Speed and memory at each micro-batch size.
    for size in arguments.micro_batch_sizes:
        if time.monotonic() > deadline:
            break
        put_rows(summary, "micro_batches", [_sized(eager, size)])
        left_out.pop(0)
        yield summary
    if left_out:
        yield summary


def _scaled(config: Config, samples: int) -> Config:
    from rlcm_fast.config.checks import validate

    prompts = replace(config.prompts, num_prompts=samples // config.prompts.images_per_prompt)
    scaled = replace(config, prompts=prompts)
    validate(scaled, 1)
    return scaled


def _numbered(config: Config, out: Path) -> Config:
    """Puts numbers in place of micro-batches of auto, once for all trainers: on a GPU those that are planned to fit."""
    import torch

    from rlcm_fast.stages.chosen_batches import choose_batches

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = choose_batches(replace(config, run_dir=str(out / "no_run")), device, print).config
    return replace(chosen, run_dir=config.run_dir)


def _mode(
    config: Config, arguments: argparse.Namespace, flops: dict[str, float], summary: dict[str, Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of the iteration, and rows of its stages; rows of inference go into the summary."""
    # Measure everything on one trainer: a warm-up, the pairs, and one iteration under the profiler.
    _forget_peak()
    mode, num_pairs, start = config.engine.compile, arguments.pairs, time.perf_counter()
    with temporary_trainer(replace(config, profile=num_pairs + 2), num_pairs + 2) as trainer:
        built = time.perf_counter()
        noise = noise_of_ratio(trainer)
        first = time.perf_counter() - built
        inference = [inference_ms(trainer, steps) for steps in arguments.inference_steps]
        beside = _Beside(trainer, num_pairs)
        full = run_with_hook(trainer, beside)[1:]
        profiled = _profiled(Path(trainer.config.run_dir), num_pairs + 2)
    put_rows(summary, "inference", [{"compile": mode, **each} for each in inference])
    rows = [pair(*both) for both in zip(full, beside.bare[1:], strict=True)]
    stages = beside.stages[1:]
    rate = statistics.median(beside.rates[1:])

    # Put the numbers side by side: seconds, and what they make of the device's rate.
    row = {
        "compile": mode,
        "micro_batch_size": config.update.micro_batch_size,
        "pairs": num_pairs,
        "images_per_second": arguments.samples / median_of(rows, "full"),
        **_seconds_of(rows, stages),
        "overhead": median_of(rows, "overhead"),
        "matmul_tflops": rate,
        **_utilisation(config, flops, stages, rate),
        "gpu_busy": profiled["gpu_busy"],
        "build_seconds": built - start,
        "first_passes_seconds": first,  # with compilation
        **noise,
        **peak_gib(),
    }
    return row, [{"compile": mode, **each} for each in profiled["stages"]]


class _Beside:
    """What happens between iterations: bare passes and a matrix product; and what the last one's stages took."""

    def __init__(self, trainer: Trainer, num_pairs: int) -> None:
        self.bare: list[dict[str, float]] = []  # one for the warm-up, then for each pair
        self.stages: list[dict[str, float]] = []
        self.rates: list[float] = []
        self._config, self._number = trainer.config, num_pairs + 1
        self._passes = BarePasses.beside(trainer)
        self._clock = DeviceClock()
        self._clock.wrap(trainer.images, "explore", "sampling")
        self._clock.wrap(trainer.images, "decode", "decode")
        self._clock.wrap(trainer.updater, "update", "update")

    def __call__(self) -> None:
        stages = self._clock.read()
        if self.bare:
            self.stages.append(stages)
        if len(self.bare) < self._number:  # nothing beside the iteration that is profiled
            self.bare.append(self._passes())
            self.rates.append(matmul_tflops(self._config))


def _profiled(run_dir: Path, iteration: int) -> dict[str, Any]:
    return json.loads((run_dir / "profile" / f"iteration_{iteration:06d}_stages.json").read_text(encoding="utf-8"))


def _utilisation(
    config: Config, flops: dict[str, float], stages: Sequence[dict[str, float]], rate: float
) -> dict[str, float]:
    """Shares of the rate that the update and sampling reach, by the medians of their seconds in the same iterations."""
    from rlcm_fast.config.resolved import resolve

    sizes = resolve(config, 1).sizes
    images = sizes.samples_per_iteration
    update, sampling = (statistics.median(row[stage] for row in stages) for stage in ("update", "sampling"))
    transitions = images * sizes.actions_per_sample * config.update.num_passes
    return {
        "update_mfu": flops["paper"] * transitions / update / rate / 1e12,
        "update_hfu": flops["executed"] * transitions / update / rate / 1e12,
        "sampling_mfu": flops["forward"] * images * config.policy.num_steps / sampling / rate / 1e12,
    }


def _seconds_of(rows: Sequence[dict[str, float]], stages: Sequence[dict[str, float]]) -> dict[str, float]:
    """Medians and quartiles of full and bare, and of stages of the full iterations; medians of the bare stages."""
    whole = ("full", "bare")
    columns = {key: [row[key] for row in rows] for key in whole}
    columns |= {stage: [row[stage] for row in stages] for stage in ("sampling", "decode", "update")}
    seconds: dict[str, float] = {}
    for key, values in columns.items():
        quartiles = {"": 0.5, "_q1": 0.25, "_q3": 0.75}
        seconds |= {f"{key}_seconds{name}": percentile(values, share) for name, share in quartiles.items()}
    more = [key for key in rows[0] if "overhead" not in key and key not in whole]
    return seconds | {f"{'' if '_cpu' in key else 'bare_'}{key}_seconds": median_of(list(rows), key) for key in more}


def noise_of_ratio(trainer: Trainer) -> dict[str, float]:
    """abs(ratio - 1) of one rollout micro-batch's transitions; passes with gradients, as training runs them."""
    import torch

    from rlcm_fast.prompts import load_prompts

    # Sample one micro-batch.
    size = trainer.config.rollout.micro_batch_size
    prompts = list(itertools.islice(itertools.cycle(load_prompts(trainer.config.prompts.source)), size))
    generator = torch.Generator().manual_seed(0)
    trajectory, _ = trainer.images.policy.sample(trainer.images.encode(prompts), generator)

    # Its transitions in the update's micro-batches, shuffled; a rest that would need another graph is left out.
    order = torch.randperm(trajectory.num_transitions, generator=generator)
    step = trainer.config.update.micro_batch_size
    deviations: list[float] = []
    for rows in order[: len(order) // step * step or len(order)].split(step):
        transitions = trajectory.transitions(rows)
        log_prob = trainer.images.policy.log_prob(transitions).detach()
        deviations += torch.expm1(log_prob - transitions.log_prob_old).abs().tolist()
    return {
        "ratio_noise_median": percentile(deviations, 0.5),
        "ratio_noise_p90": percentile(deviations, 0.9),
        "ratio_noise_max": max(deviations),
    }


def inference_ms(trainer: Trainer, num_steps: int) -> dict[str, Any]:
    """Median milliseconds an image, of five, of sampling and decoding a rollout micro-batch; text encoded before."""
    import torch

    from rlcm_fast.prompts import load_prompts

    size = trainer.config.rollout.micro_batch_size
    policy = policy_of(trainer, trainer.engine, num_steps)
    conditioning = trainer.images.encode([load_prompts(trainer.config.prompts.source)[0]] * size)
    generator = torch.Generator().manual_seed(0)
    decode = trainer.images.backbone.decode
    sampling = statistics.median(seconds_of_calls(lambda: policy.sample(conditioning, generator), 6)[1:])
    both = statistics.median(seconds_of_calls(lambda: decode(policy.sample(conditioning, generator)[1]), 6)[1:])
    ms = {"sampling_ms": 1e3 * sampling / size, "image_ms": 1e3 * both / size}
    return {"num_steps": num_steps, "batch_size": size, **ms}


def _sized(config: Config, size: int) -> dict[str, Any]:
    """Images/s and peak memory at one micro-batch size, or that it does not fit."""
    import torch

    _forget_peak()
    try:
        return {**throughput(config, size, 2), **peak_gib()}
    except torch.cuda.OutOfMemoryError:
        return {"micro_batch_size": size, "images_per_second": None, "note": "out of memory"}


def _forget_peak() -> None:
    """Resets the peak, and frees what an earlier trainer took, whose parts point at each other."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> dict[str, float]:
    """What was allocated at most, with bare passes by their copy of the UNet too; nothing on a CPU."""
    import torch

    return {"peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}


if __name__ == "__main__":
    sys.exit(main())
