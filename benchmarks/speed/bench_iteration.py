"""What an iteration costs beyond the network passes it cannot avoid, in one process and run, alternately.

    python benchmarks/speed/bench_iteration.py --config configs/shapes/compressibility.yaml --pairs 20

 (a) full: an iteration of `Trainer.run` itself, wall clock from the end of one evaluation hook to the next: prompts,
     rollout with rewards, advantages, update under DeepSpeed, metrics, log, state for a checkpoint.
 (b) bare: the network passes and optimizer steps of it and nothing else (bare_passes.py).

overhead = a / b of neighbouring measurements, so that a slow minute of the machine counts for both; overhead_cpu is the
same of processor time, which other processes disturb less. The share of a stage is the median over the pairs of its
part of (a), "other" that of what the stages leave. Evaluation, grids and checkpoints are switched off. For each of
--micro-batch-sizes the trainer is built anew, with that rollout.micro_batch_size and update.micro_batch_size.
Writes OUT.csv (pairs), OUT_stages.csv, OUT_micro_batches.csv and OUT.json, which is also the last line on stdout.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.bare_passes import STAGES, BarePasses, Seconds, finish_device_work
from benchmarks.shared.reporting import percentile, print_summary, write_csv
from benchmarks.shared.training_runs import add_config_arguments, read_config, temporary_trainer

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer


# Options that switch off what is not part of every iteration.
NOTHING_BESIDES = (
    "--evaluation.every=0",
    "--evaluation.rewards=[]",
    "--guard.action=off",
    "--checkpoint.best=",
    "--tracking.grid_every=0",
    "--checkpoint.every=0",
    "--tracking.plan=false",
)


def main() -> int:
    arguments = _parser().parse_args()
    from rlcm_fast.train import set_process_environment

    set_process_environment()
    # Measure.
    try:
        config = _config(arguments)
        pairs = measure_pairs(config, arguments.pairs, arguments.warm_up)
        sweep = [throughput(config, size, arguments.sweep_iterations) for size in arguments.micro_batch_sizes]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Write.
    stem = arguments.out.with_suffix("")
    write_csv(stem.with_suffix(".csv"), pairs)
    write_csv(stem.with_name(f"{stem.name}_stages.csv"), stage_shares(pairs))
    if sweep:
        write_csv(stem.with_name(f"{stem.name}_micro_batches.csv"), sweep)
    summary = {**summarise(pairs), "micro_batches": sweep, "config": arguments.config}
    print_summary(summary, stem.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--pairs", type=int, default=20, help="measurements, at least 10 for a claim (default 20)")
    parser.add_argument("--warm-up", type=int, default=3, help="pairs before, not counted (default 3)")
    parser.add_argument("--micro-batch-sizes", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64], metavar="N",
                        help="sizes whose images/s are measured; none: the option without a value")  # fmt: skip
    parser.add_argument("--sweep-iterations", type=int, default=3, help="iterations for each size (default 3)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_iteration.csv"))
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    """The config without what is not part of every iteration."""
    if arguments.pairs < 2 or arguments.warm_up < 1:
        raise ValueError(f"pairs={arguments.pairs}, warm_up={arguments.warm_up}: give 2 or more, and 1 or more")
    config = read_config(arguments, *NOTHING_BESIDES)
    if config.engine.zero_stage > 0:
        raise ValueError(
            f"engine.zero_stage={config.engine.zero_stage} keeps master weights, which the bare passes do not; use 0"
        )
    return config


def measure_pairs(config: Config, num_pairs: int, num_warm_up: int) -> list[Seconds]:
    """One row a pair: full, bare, overhead and the stages of bare, in seconds."""
    with temporary_trainer(config, num_warm_up + num_pairs + 1) as trainer:
        bare: list[Seconds] = []
        passes = BarePasses.beside(trainer)
        full = run_with_hook(trainer, lambda: bare.append(passes()))
    chosen = slice(num_warm_up, num_warm_up + num_pairs)
    return [pair(times, stages) for times, stages in zip(full[chosen], bare[chosen], strict=True)]


def pair(full: Seconds, bare: Seconds) -> Seconds:
    """A row from wall and cpu seconds of an iteration and the seconds of the bare stages, with the bare cpu seconds."""
    stages = {stage: bare[stage] for stage in STAGES}
    total = sum(stages.values())
    row = {"full": full["wall"], "bare": total, "overhead": full["wall"] / total}
    cpu = {"full_cpu": full["cpu"], "bare_cpu": bare["cpu"], "overhead_cpu": full["cpu"] / bare["cpu"]}
    return {**row, **cpu, **stages}


def run_with_hook(trainer: Trainer, between: Callable[[], Any]) -> list[Seconds]:
    """Wall and cpu seconds of the iterations of `trainer.run()`; `between` runs where a run would evaluate.

    Those of the last iteration are not known, as the run writes neither checkpoint nor export at its end.
    """
    seconds: list[Seconds] = []
    start, cpu_start = 0.0, 0.0

    # In the place of an evaluation: stop the clock, do what is asked for, start it again.
    def evaluate(iteration: int) -> dict[str, float]:
        nonlocal start, cpu_start
        finish_device_work()
        if iteration > 0:
            seconds.append({"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start})
        if iteration < trainer.config.num_iterations:
            between()
        start, cpu_start = time.perf_counter(), time.process_time()
        return {}

    # Run, and write nothing at the end.
    trainer.evaluate = evaluate
    trainer.progress.save = trainer.finish = lambda: None
    trainer.run()
    return seconds


def summarise(pairs: list[Seconds]) -> dict[str, Any]:
    """Median, 90th percentile and quartiles of full / bare."""
    overheads = [row["overhead"] for row in pairs]
    return {
        "overhead_median": statistics.median(overheads),
        "overhead_p90": percentile(overheads, 0.9),
        "overhead_quartiles": [percentile(overheads, 0.25), percentile(overheads, 0.75)],
        "full_seconds_median": median_of(pairs, "full"),
        "bare_seconds_median": median_of(pairs, "bare"),
        "overhead_cpu_median": median_of(pairs, "overhead_cpu"),
        "pairs": len(pairs),
    }


def median_of(rows: list[Seconds], column: str) -> float:
    """The median of one column."""
    return statistics.median(row[column] for row in rows)


def stage_shares(pairs: list[Seconds]) -> list[dict[str, Any]]:
    """One row a stage: medians over the pairs of its seconds and its share of the full iteration."""
    rows = []
    for stage in (*STAGES, "other"):
        seconds, shares = [], []
        for row in pairs:
            part = row["full"] - row["bare"] if stage == "other" else row[stage]
            seconds.append(part)
            shares.append(part / row["full"])
        rows.append({"stage": stage, "seconds": statistics.median(seconds), "share": statistics.median(shares)})
    return rows


def with_micro_batches(config: Config, size: int) -> Config:
    """The config with micro-batches of `size` samples and transitions; ValueError where they do not divide."""
    from rlcm_fast.config.checks import validate

    sized = replace(
        config,
        rollout=replace(config.rollout, micro_batch_size=size),
        update=replace(config.update, micro_batch_size=size),
    )
    validate(sized, 1)
    return sized


def throughput(config: Config, size: int, num_iterations: int) -> dict[str, Any]:
    """Images/s of full iterations at one micro-batch size, sampling and training alike; the first is a warm-up."""
    from rlcm_fast.config.resolved import resolve

    sized = with_micro_batches(config, size)
    with temporary_trainer(sized, num_iterations + 2) as trainer:
        times = run_with_hook(trainer, lambda: None)[1:]
    median = median_of(times, "wall")
    images = resolve(sized, 1).sizes.samples_per_iteration
    return {"micro_batch_size": size, "images_per_second": images / median, "seconds_per_iteration": median}


if __name__ == "__main__":
    sys.exit(main())
