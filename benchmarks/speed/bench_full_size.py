"""An iteration of a full-size model with random weights: seconds by stage, MFU, noise of the ratio, inference time.

    python benchmarks/speed/bench_full_size.py --out FOLDER  # on a GPU: SD1.5 LCM, every weight, 512 x 512
    python benchmarks/speed/bench_full_size.py --config configs/shapes/compressibility.yaml --modes off --out FOLDER

For each of --modes (engine.compile), in one process:

 iteration   a full iteration of the trainer beside its bare network passes, as in bench_iteration.py: medians of
             --pairs after a warm-up, of --samples images (the config's own number is scaled from it and said to be)
 MFU, HFU    of the update: floating point operations that the model needs (MFU: forward and backward) or that ran
             (HFU: recomputation and the KL term's forward too) in its seconds, over the rate of a large matrix
             product in the same precision, measured in this run
 ratio       abs(ratio - 1) of a rollout's transitions under unchanged weights, in training's micro-batches and graphs:
             what rounding does; 1e-4 is the clip range
 inference   2, 4 and 8 steps and the decode, milliseconds an image

and for each of --micro-batch-sizes images/s and peak memory of full iterations, uncompiled. Writes OUT/full_size.csv,
full_size_micro_batches.csv, full_size_inference.csv and full_size.json, whose content is also the last line on stdout,
anew after each mode and size, so that a run that is cut off leaves those that had ended. What it had not come to, or
what had not begun by --seconds, is named under left_out.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import BarePasses, policy_of, seconds_of_calls
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
from benchmarks.speed.model_flops import flops_of, matmul_tflops

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

_INFERENCE_STEPS = (2, 4, 8)
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
                for name, key in (("", "modes"), ("_micro_batches", "micro_batches"), ("_inference", "inference")):
                    write_csv(arguments.out / f"full_size{name}.csv", summary[key])
                print_summary(summary, arguments.out / "full_size.json")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/sd15_lcm/full_24gb.yaml")
    parser.add_argument("--modes", nargs="+", choices=_MODES, default=["off", "regional"], help="of engine.compile")
    parser.add_argument("--samples", type=int, default=64, help="images of a measured iteration (default 64)")
    parser.add_argument("--pairs", type=int, default=3, help="measured iterations of a mode (default 3)")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32], metavar="N")
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
    samples, rate, flops = _scaled(config, arguments.samples), matmul_tflops(config), flops_of(config)
    images = config.prompts.num_prompts * config.prompts.images_per_prompt
    left_out = [f"engine.compile={mode}" for mode in arguments.modes]
    left_out += [f"micro-batches of {size}" for size in arguments.micro_batch_sizes]
    summary: dict[str, Any] = {"config": arguments.config, "samples": arguments.samples, "matmul_tflops": rate}
    summary |= {"modes": [], "inference": [], "micro_batches": [], "left_out": left_out}
    eager = replace(samples, engine=replace(samples.engine, compile="off"))
    for size in arguments.micro_batch_sizes:
        with_micro_batches(eager, size)  # a size that does not divide is found before minutes are spent

    # Iterations and inference in each mode.
    for mode in arguments.modes:
        if time.monotonic() > deadline:
            break
        compiled = replace(samples, engine=replace(samples.engine, compile=mode))
        row, inference = _mode(compiled, arguments.pairs, rate, flops)
        row[f"seconds_of_{images}_scaled"] = row["full_seconds"] * images / arguments.samples
        summary["modes"].append(row)
        summary["inference"] += inference
        left_out.pop(0)
        yield summary

    # Speed and memory at each micro-batch size.
    for size in arguments.micro_batch_sizes:
        if time.monotonic() > deadline:
            break
        summary["micro_batches"].append(_sized(eager, size))
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


def _mode(
    config: Config, num_pairs: int, rate: float, flops: dict[str, float]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A row of the iteration, and rows of inference."""
    from rlcm_fast.config.resolved import resolve

    # Measure everything on one trainer.
    _forget_peak()
    start = time.perf_counter()
    with temporary_trainer(config, num_pairs + 2) as trainer:
        built = time.perf_counter()
        noise = noise_of_ratio(trainer)
        first = time.perf_counter() - built
        inference = [inference_ms(trainer, steps) for steps in _INFERENCE_STEPS]
        passes = BarePasses.beside(trainer)
        bare: list[dict[str, float]] = []
        full = run_with_hook(trainer, lambda: bare.append(passes()))[1:]
        update = _median_of_log(Path(trainer.config.run_dir), "seconds/update")
        rollout = _median_of_log(Path(trainer.config.run_dir), "seconds/rollout")
    rows = [pair(*both) for both in zip(full, bare[1:-1], strict=True)]

    # Put the numbers side by side: seconds, and what they make of the device's rate.
    sizes = resolve(config, 1).sizes
    images = sizes.samples_per_iteration
    transitions = images * sizes.actions_per_sample * config.update.num_passes
    of_update = transitions / update / rate / 1e12
    row = {
        "compile": config.engine.compile,
        "micro_batch_size": config.update.micro_batch_size,
        "images_per_second": images / median_of(rows, "full"),
        **_seconds_of(rows),
        "overhead": median_of(rows, "overhead"),
        "rollout_seconds": rollout,
        "update_seconds": update,
        "update_mfu": flops["model"] * of_update,
        "update_hfu": flops["executed"] * of_update,
        "sampling_mfu": flops["forward"] * images * config.policy.num_steps / passes.spent["sampling"] / rate / 1e12,
        "build_seconds": built - start,
        "first_passes_seconds": first,  # with compilation
        **noise,
        **peak_gib(),
    }
    return row, [{"compile": config.engine.compile, **each} for each in inference]


def _seconds_of(rows: list[dict[str, float]]) -> dict[str, float]:
    """The medians of all columns that are seconds."""
    return {f"{key}_seconds": median_of(rows, key) for key in rows[0] if "overhead" not in key}


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
    """Median milliseconds an image of sampling and decoding a rollout micro-batch; text encoded before."""
    import torch

    from rlcm_fast.prompts import load_prompts

    size = trainer.config.rollout.micro_batch_size
    policy = policy_of(trainer, trainer.engine, num_steps)
    conditioning = trainer.images.encode([load_prompts(trainer.config.prompts.source)[0]] * size)
    generator = torch.Generator().manual_seed(0)
    decode = trainer.images.backbone.decode
    sampling = statistics.median(seconds_of_calls(lambda: policy.sample(conditioning, generator), 4)[1:])
    both = statistics.median(seconds_of_calls(lambda: decode(policy.sample(conditioning, generator)[1]), 4)[1:])
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


def _median_of_log(run_dir: Path, key: str) -> float:
    """The median over all iterations but the first, which warms up."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(line[key] for line in lines[1:])


if __name__ == "__main__":
    sys.exit(main())
