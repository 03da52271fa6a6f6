"""Samples a second of one and the same RLCM iteration: our trainer, the paper's loop, and trl's DDPOTrainer.

    python benchmarks/speed/bench_peers.py --config configs/shapes/compressibility.yaml

 ours        an iteration of `Trainer.run` itself, with its log and its state for a checkpoint
 paper_loop  paper_loop.py: the same model, steps, batch, rewards and optimizer, as the paper's authors run it
 ladder      the paper's loop with one habit after another given up, each row keeping what the rows before it changed
 trl         DDPO of trl 0.23.1 on --trl-model where it is installed (pip install -e '.[trl]'), else null and why

Loops run in turn, round after round, after a warm-up of each; medians over the rounds. The KL term is off, as the paper
has none. trl does other work for a sample (see trl_ddpo.py) and is measured after the others, with --trl-samples an
epoch, or its batch size where that is more: its batches share nothing, so a few samples are enough.

speedup_over_paper_loop is the ratio of the medians, ..._cpu that of processor time, which other processes disturb less
(our reward workers' included). Writes OUT.json, which is also the last line on stdout, and
OUT_stages.csv; --profile FOLDER adds a trace of one iteration of ours and of the paper's loop for chrome://tracing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.shared.reporting import print_summary, write_csv
from benchmarks.shared.training_runs import add_config_arguments, read_config, temporary_trainer
from benchmarks.speed.bench_iteration import finish_device_work, run_with_hook

if TYPE_CHECKING:
    from rlcm_fast.config import Config

OURS, PAPER = "ours", "paper_loop"
Seconds = dict[str, float]


@dataclass
class Measured:
    """The iterations of one loop after its warm-up."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    stages: list[Seconds] = field(default_factory=list)
    calls: dict[str, list[int]] = field(default_factory=dict)  # rows of each network call of an iteration, by stage

    def add(self, spent: Seconds, stages: Seconds, calls: dict[str, list[int]]) -> None:
        self.seconds.append(spent["wall"])
        self.cpu_seconds.append(spent["cpu"])
        self.stages.append({**stages, "other": spent["wall"] - sum(stages.values())})
        self.calls = calls

    def rounds(self, count: int) -> Measured:
        """Without the warm-up and what came after the rounds."""
        kept = slice(1, count + 1)
        return Measured(self.seconds[kept], self.cpu_seconds[kept], self.stages[kept], self.calls)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def cpu_median(self) -> float:
        return statistics.median(self.cpu_seconds)

    def stage_median(self, prefix: str) -> float:
        """The median seconds of all stages whose names begin so."""
        seconds = []
        for stages in self.stages:
            seconds.append(sum(spent for name, spent in stages.items() if name.startswith(prefix)))
        return statistics.median(seconds)


def main() -> int:
    arguments = _parser().parse_args()
    stem = arguments.out.with_suffix("")
    from rlcm_fast.train import set_process_environment

    set_process_environment()
    # Measure the loops in turn, then trl.
    try:
        config = _config(arguments)
        load = os.getloadavg()[0]
        loops, traces = measure(config, arguments.repeats, arguments.profile)
        stages = stage_rows({name: loops[name] for name in (PAPER, OURS)})
        _print_table(stages)
        write_csv(stem.with_name(f"{stem.name}_stages.csv"), stages)
        trl = measure_trl(config, arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # Sum up.
    about = {"traces": traces, "load_averages": [load, os.getloadavg()[0]], "config": arguments.config}
    print_summary({**summarise(loops, trl, config), **about}, stem.with_suffix(".json"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_config_arguments(parser, "configs/shapes/compressibility.yaml")
    parser.add_argument("--repeats", type=int, default=5, help="iterations of each loop after a warm-up (default 5)")
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="write traces of torch.profiler there")
    parser.add_argument("--trl-model", default="shapes/teacher", help="default shapes/teacher")
    parser.add_argument("--trl-samples", type=int, help="samples of an epoch of trl's (default as many as ours)")
    text = "batch sizes of trl's sampling and training (default 1, which is trl's); none: the option without a value"
    parser.add_argument("--trl-batch-sizes", type=int, nargs="*", default=[1], metavar="N", help=text)
    parser.add_argument("--trl-steps", type=int, default=50, help="its sampler's steps (default 50, which is trl's)")
    parser.add_argument("--trl-repeats", type=int, help="its epochs after a warm-up (default as --repeats)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/bench_peers.json"))
    return parser


def _config(arguments: argparse.Namespace) -> Config:
    """The config without what is not the paper's iteration.

    Raises:
        ValueError: the paper's loop cannot do the same work.
    """
    # Switch off what the paper's loop has not.
    if arguments.repeats < 1:
        raise ValueError(f"repeats={arguments.repeats}: give 1 or more, 5 for a claim")
    off = ("--evaluation.every=0", "--evaluation.rewards=[]", "--tracking.grid_every=0", "--checkpoint.every=0")
    off += ("--update.kl_weight=0",)
    config = read_config(arguments, *off)

    # Refuse what it does otherwise.
    required = {
        "policy.kind": ("consistency" if config.policy.kind == "auto" else config.policy.kind, "consistency"),
        "engine.dtype": (config.engine.dtype, "fp32"),
        "update.num_updates": (config.update.num_updates, 1),
        "update.num_passes": (config.update.num_passes, 1),
    }
    for name, (value, needed) in required.items():
        if value != needed:
            raise ValueError(f"{name}={value} is not what the paper's loop does; use {needed}")
    return config


def measure(config: Config, num_repeats: int, folder: Path | None) -> tuple[dict[str, Measured], dict[str, Any]]:
    """The rounds of the ladder and ours; and what the traces in `folder` hold."""
    from benchmarks.speed.peer_loops import export, ladder, new_profiler, watched

    # The loops, and a profiler for two of them.
    rungs = ladder(config)
    found = {name: Measured() for name in [*rungs, OURS]}
    reads: list[Any] = []  # of the clock, before each iteration of ours
    tracers = {name: new_profiler() for name in (PAPER, OURS)} if folder else {}

    # Between two iterations of ours: one of each other loop, and at the end the traces.
    def between() -> None:
        number = len(reads)
        reads.append(clock.read())
        if number <= num_repeats:
            for name, loop in rungs.items():
                found[name].add(_seconds(loop.iteration), *loop.clock.read())
        elif tracers and number == num_repeats + 1:
            with tracers[PAPER]:
                rungs[PAPER].iteration()
            tracers[OURS].start()
        elif tracers:
            tracers[OURS].stop()

    # Iterations of ours: a warm-up, the repeats, one for the trace, and the last, which writes a checkpoint.
    with temporary_trainer(config, num_repeats + 2 + bool(folder)) as trainer:
        clock = watched(trainer)
        seconds = run_with_hook(trainer, between)
    for row, read in zip(seconds, reads[1:], strict=False):
        found[OURS].add(row, *read)

    # Without the warm-up.
    rounds = {name: measured.rounds(num_repeats) for name, measured in found.items()}
    traces = {}
    if folder:
        for name, tracer in tracers.items():
            traces[name] = export(tracer, folder / f"{name}.json.gz")
    return rounds, traces


def measure_trl(config: Config, arguments: argparse.Namespace) -> dict[str, Any]:
    """One row for each batch size; trl is null where it cannot be imported, with the reason."""
    from benchmarks.speed.peer_loops import rewards_of, some_prompts
    from benchmarks.speed.trl_ddpo import Batches, ddpo_epoch, reason_missing

    reason = reason_missing() if arguments.trl_batch_sizes else "not asked for"
    if reason:
        return {"trl": None, "trl_reason": reason}
    rows = []
    for size in arguments.trl_batch_sizes:
        num_samples = max(size, arguments.trl_samples or _num_samples(config))
        batches = Batches(num_samples, size, arguments.trl_steps)
        epoch = ddpo_epoch(arguments.trl_model, some_prompts(config), rewards_of(config), batches)
        num_epochs = 1 + (arguments.trl_repeats or arguments.repeats)
        seconds = [_seconds(epoch)["wall"] for _ in range(num_epochs)]
        spread = _spread(seconds[1:])
        rates = {"samples": num_samples, "samples_per_second": num_samples / spread["median"]}
        rows.append({"batch_size": size, "num_steps": arguments.trl_steps, **rates, "seconds": spread})
    return {"trl": rows, "trl_reason": None}


def _seconds(function: Callable[[], None]) -> Seconds:
    start, cpu_start = time.perf_counter(), time.process_time()
    function()
    finish_device_work()
    return {"wall": time.perf_counter() - start, "cpu": time.process_time() - cpu_start}


def summarise(found: dict[str, Measured], trl: dict[str, Any], config: Config) -> dict[str, Any]:
    """Medians over the rounds, and ratios of medians."""
    # Rates, and how much faster ours is, as a whole and stage by stage.
    num_samples, ours, paper = _num_samples(config), found[OURS], found[PAPER]
    rate = num_samples / ours.median
    trl_rates = [row["samples_per_second"] for row in trl["trl"] or []]
    by_stage = {}
    for stage in ("sampling", "decode", "reward", "training"):
        by_stage[stage] = _ratio(paper.stage_median(stage), ours.stage_median(stage))

    # What was measured.
    settings = {
        "model": config.model.path,
        "num_steps": config.policy.num_steps,
        "samples": num_samples,
        "sampling_micro_batch_size": config.rollout.micro_batch_size,
        "update_micro_batch_size": config.update.micro_batch_size,
    }
    return {
        "speedup_over_paper_loop": paper.median / ours.median,
        "speedup_over_paper_loop_cpu": paper.cpu_median / ours.cpu_median,
        "speedup_over_trl": [_ratio(rate, other) for other in trl_rates] or None,
        "speedup_over_paper_loop_by_stage": by_stage,
        "samples_per_second": {OURS: rate, PAPER: num_samples / paper.median, "trl": trl_rates},
        "seconds": {name: _spread(measured.seconds) for name, measured in found.items()},
        "ladder": ladder_rows(found, num_samples),
        **trl,
        "repeats": len(ours.seconds),
        "settings": settings,
    }


def ladder_rows(found: dict[str, Measured], num_samples: int) -> list[dict[str, Any]]:
    """What each change brings, kept by those below it; the last, to ours, is all that is left."""
    rows, before = [], found[PAPER]
    for name, measured in found.items():
        row = {"change": name, "samples_per_second": num_samples / measured.median}
        factors = {"factor": before.median / measured.median, "cpu_factor": before.cpu_median / measured.cpu_median}
        rows.append({**row, **factors})
        before = measured
    return rows


def stage_rows(found: dict[str, Measured]) -> list[dict[str, Any]]:
    """One row for each loop and stage: medians over the rounds; network calls of one iteration and rows of a call."""
    rows = []
    for loop, measured in found.items():
        for stage in measured.stages[0]:
            ms = 1000 * measured.stage_median(stage)
            share = ms / (1000 * measured.median)
            calls = measured.calls.get(stage, [])
            row = {"loop": loop, "stage": stage, "ms": round(ms, 2), "share": round(share, 4)}
            mean_batch = statistics.fmean(calls) if calls else None
            rows.append({**row, "network_calls": len(calls), "mean_batch": mean_batch})
    return rows


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        calls = f"{row['network_calls']:5} calls of {row['mean_batch']:g}" if row["network_calls"] else ""
        print(f"{row['loop']:12} {row['stage']:20} {row['ms']:10.1f} ms {row['share']:6.1%} {calls}".rstrip())


def _num_samples(config: Config) -> int:
    return config.prompts.num_prompts * config.prompts.images_per_prompt


def _spread(seconds: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None


if __name__ == "__main__":
    sys.exit(main())
