"""Peak memory of every strategy by stage, measured and planned, under a cap.

    python benchmarks/memory/bench_memory.py --out FOLDER                 # on a GPU: SD1.5 and SDXL, capped at 24 GiB
    python benchmarks/memory/bench_memory.py --cases shapes --out FOLDER  # anywhere: the model that ships

A case is a config with overrides. In a process of its own it is trained for two updates of two micro-batches, all by
the real trainer with random weights (random_models.py), and what is allocated at most is read at each stage of the
run: on a GPU from torch's allocator, whose process is capped by set_per_process_memory_fraction; on a CPU
by counting storages as they come and go (planner/tracing.py). In another process `rlcm-fast plan`'s arithmetic says
what it should be. The planner's 1.2 GiB for CUDA and the allocator are no allocation and are left out of both. On a GPU
they are measured too: `fragments_gib` is what the allocator held beyond its tensors at its peak, and `context_gib` what
the first case's process, alone on the device, took beside that.

Writes OUT/memory.csv, a row a case and stage: planned_gib, measured_gib, error (planned / measured - 1), and
memory.json, whose content is also the last line on stdout: cases within 5 % at their peak, and the misses. As many
processes as caps fit into the GPU run beside each other. The CSV is written as cases end, in their order; with
--seconds, what has not begun by then is left out and named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.memory.memory_cases import CASES, Case
from benchmarks.shared.reporting import ROOT, print_summary, write_csv

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.trainer import Trainer

STAGES = ("encoding", "sampling", "decoding", "update", "step")
_GIB = 2**30
_WITHIN = 0.05


def main() -> int:
    arguments = _parser().parse_args()
    if arguments.plan or arguments.measure:  # a process that `run_cases` started
        print(json.dumps(_answer(arguments)), flush=True)
        return 0
    try:
        rows, left_out = run_cases(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_csv(arguments.out / "memory.csv", rows)
    summary = {"cases": arguments.cases, "cap_gib": arguments.cap_gib, **summarise(rows), "left_out": left_out}
    print_summary(summary, arguments.out / "memory.json")
    return 0 if not summary["failed"] else 1


def _answer(arguments: argparse.Namespace) -> dict[str, Any]:
    """What is planned or measured of the one case."""
    cases = {case.name: case for case in CASES[arguments.cases]}
    if arguments.plan:
        return planned(cases[arguments.plan])
    return measured(cases[arguments.measure], arguments.cap_gib)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=list(CASES), default="full_size", help="default full_size")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the cases; a wrong name lists all")
    parser.add_argument("--cap-gib", type=float, default=24.0, help="of a process on a GPU (default 24)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--out", type=Path, default=Path("runs/memory"), help="folder (default runs/memory)")
    parser.add_argument("--plan", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--measure", metavar="NAME", help=argparse.SUPPRESS)
    return parser


def run_cases(arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of all cases, written as they come, and the names of those that there was no time for."""
    import torch

    # Share out the machine: as many processes as caps fit into the GPU, and half of the cores to plan.
    names = _chosen_names(arguments)
    deadline = time.monotonic() + arguments.seconds
    has_gpu = torch.cuda.is_available()
    num_measuring, num_planning = 1, 1
    if has_gpu:
        num_measuring = max(1, int(torch.cuda.mem_get_info()[1] / _GIB / arguments.cap_gib))
        num_planning = max(1, (os.cpu_count() or 1) // 2)
    command = [sys.executable, __file__, "--cases", arguments.cases, "--cap-gib", str(arguments.cap_gib)]

    def child(kind: str, name: str) -> dict[str, Any] | None:
        return None if time.monotonic() > deadline else _child([*command, kind, name])

    with ThreadPoolExecutor(num_planning) as planning, ThreadPoolExecutor(num_measuring) as measuring:
        # Start all plans; measure the first case alone on the device, then the others beside each other.
        plans = {name: planning.submit(child, "--plan", name) for name in names}
        before = _used_bytes() if has_gpu else 0
        alone = child("--measure", names[0])
        found = {name: measuring.submit(child, "--measure", name) for name in names[1:]}

        # Write rows as they come, in the order of the cases.
        rows: list[dict[str, Any]] = []
        left_out = []
        for name in names:
            plan = plans[name].result()
            real = found[name].result() if name in found else alone
            if plan is None or real is None:
                left_out.append(name)
                continue
            rows += rows_of(name, plan, real, arguments.cap_gib)
            if name not in found and "used_beside" in real:
                rows[0]["context_gib"] = (real["used_beside"] - before) / _GIB
            write_csv(arguments.out / "memory.csv", rows)
    return rows, left_out


def _chosen_names(arguments: argparse.Namespace) -> list[str]:
    """The names of the cases to run; ValueError where one is unknown."""
    known = [case.name for case in CASES[arguments.cases]]
    for name in arguments.only or ():
        if name not in known:
            raise ValueError(f"only={name} is no case; give some of {', '.join(known)}")
    return arguments.only or known


def _used_bytes() -> int:
    """Bytes of the GPU that this process' own context and other processes use."""
    import torch

    free, total = torch.cuda.mem_get_info()
    return total - free


def _child(command: Sequence[str]) -> dict[str, Any]:
    """The JSON on a child's last line, or why there is none."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["no message"]
        errors = [line for line in lines if "Error" in line]
        return {"failed": (errors or lines)[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_of(name: str, plan: dict[str, Any], real: dict[str, Any], cap_gib: float) -> list[dict[str, Any]]:
    """A row a stage; where the case failed or did not fit, one row that says so."""
    if failed := plan.get("failed") or real.get("failed"):
        return [{"case": name, "stage": "", "note": failed}]
    planned_peak = max(plan["stages"].values())
    if real.get("out_of_memory"):
        note = f"out of memory; the plan has {planned_peak / _GIB:.2f} GiB and the cap is {cap_gib:g}"
        return [{"case": name, "stage": "", "planned_gib": planned_peak / _GIB, "note": note}]
    stages = {stage: (plan["stages"][stage], real["stages"][stage]) for stage in STAGES}
    stages["peak"] = (planned_peak, max(real["stages"].values()))
    rows = []
    for stage, (expected, found) in stages.items():
        sizes = {"planned_gib": expected / _GIB, "measured_gib": found / _GIB, "error": expected / found - 1}
        rows.append({"case": name, "stage": stage, **sizes})
    if "reserved" in real:
        rows[-1]["fragments_gib"] = (real["reserved"] - max(real["stages"].values())) / _GIB
    return rows


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts the cases whose peak was planned within 5 %, and names those that were not measured."""
    # Sort the cases by how they went.
    errors: dict[str, float] = {}
    out_of_memory, failed = {}, {}
    for row in rows:
        if row["stage"] == "peak":
            errors[row["case"]] = row["error"]
        elif row.get("note", "").startswith("out of memory"):
            out_of_memory[row["case"]] = row["note"]
        elif "note" in row:
            failed[row["case"]] = row["note"]

    # Count those that were planned well.
    misses = {name: round(error, 4) for name, error in errors.items() if abs(error) > _WITHIN}
    return {
        "measured": len(errors),
        "within_5_percent": len(errors) - len(misses),
        "misses": misses,
        "largest_error": max(map(abs, errors.values()), default=None),
        "out_of_memory": out_of_memory,
        "failed": failed,
    }


def config_of(case: Case, run_dir: str) -> Config:
    """The case's config for two iterations, with nothing but them.

    Raises:
        ValueError: the settings do not go together.
    """
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate

    config = parse_config(["--config", str(ROOT / case.config), *case.options(), *_short(run_dir)])
    validate(config, 1)
    return config


def _short(run_dir: str) -> list[str]:
    """The options for two iterations without evaluations, grids, checkpoints and plan."""
    return [
        "--evaluation.every=0",
        "--evaluation.rewards=[]",
        "--guard.action=off",
        "--checkpoint.best=",
        "--tracking.grid_every=0",
        "--tracking.tensorboard=false",
        "--tracking.plan=false",
        "--checkpoint.every=0",
        "--num_iterations=2",
        f"--run_dir={run_dir}",
    ]


def planned(case: Case) -> dict[str, Any]:
    """Bytes of each stage without the overhead, which is no allocation."""
    import torch

    from rlcm_fast.backbones.loading import resolve_model_path
    from rlcm_fast.config.resolved import resolve
    from rlcm_fast.planner.architecture import load_architecture
    from rlcm_fast.planner.estimate import estimate_memory, measure, strategy_of
    from rlcm_fast.planner.workload import Workload

    config = config_of(case, "unused")
    architecture = load_architecture(resolve_model_path(config.model.path))
    strategy = strategy_of(config, config.model.pixels or architecture.image_size, architecture.embeds_guidance)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        strategy = replace(strategy, moves_idle=False)  # idle parts have nowhere to go
    profiles, workload = measure(architecture, strategy, device), Workload.of(resolve(config, 1))
    memory = estimate_memory(strategy, profiles, workload, device=device)
    return {"stages": {stage: size - memory.overhead for stage, size in memory.stages.items()}}


def measured(case: Case, cap_gib: float) -> dict[str, Any]:
    """Bytes of each stage; what the process holds beside its tensors, on a GPU; or that it ran out of memory."""
    import torch

    from rlcm_fast.train import set_process_environment

    # Cap the process.
    set_process_environment()
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_gib * _GIB / torch.cuda.mem_get_info()[1]))

    # Train with a meter on each stage.
    from benchmarks.shared.random_models import random_weights
    from rlcm_fast.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder, random_weights("cuda" if is_cuda else "cpu"):
        config = config_of(case, f"{folder}/run")
        try:
            with _meter() as meter:
                trainer = Trainer(config)
                _watch(trainer, meter)
                trainer.run()
        except torch.cuda.OutOfMemoryError:
            return {"out_of_memory": True}
        return {"stages": {stage: meter.peaks[stage] for stage in STAGES}, **meter.beside()}


@contextmanager
def _meter() -> Iterator[Any]:
    import torch

    from benchmarks.memory.memory_meter import CudaMeter, StorageMeter

    if torch.cuda.is_available():
        yield CudaMeter()
        return
    with StorageMeter() as meter:
        yield meter


def _watch(trainer: Trainer, meter: Any) -> None:
    """Names the stages of a run; nothing else of it changes, but that it ends without checkpoint and export."""
    trainer.progress.save = trainer.finish = lambda: None
    meter.begin()
    meter.wrap(trainer.images, "encode", "encoding")
    meter.wrap(trainer.images.policy, "sample", "sampling")
    meter.wrap(trainer.images.backbone, "decode", "decoding")
    meter.wrap(trainer.updater, "update", "update")
    meter.wrap(trainer.engine.engine, "step", "step")  # within an update


if __name__ == "__main__":
    sys.exit(main())
