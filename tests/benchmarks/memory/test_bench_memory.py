"""bench_memory: the cases, a real run beside its plan, and what becomes of runs that fail."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import bench_memory
from benchmarks.memory.memory_cases import CASES, Case
from benchmarks.memory.memory_meter import StorageMeter

EVERY = [case for cases in CASES.values() for case in cases]
GIB = 2**30


@pytest.mark.parametrize("case", EVERY, ids=lambda case: case.name)
def test_every_case_is_two_whole_micro_batches(case: Case):
    from rlcm_fast.config.resolved import resolve

    config = bench_memory.config_of(case, "unused")
    sizes = resolve(config, 1).sizes
    micro_batches = sizes.micro_batches_per_update_and_process * config.update.num_updates
    assert micro_batches == 2
    assert sizes.samples_per_iteration == config.rollout.micro_batch_size == config.update.micro_batch_size


def test_targets_and_at_least_twelve_configurations_are_among_the_cases():
    names = [case.name for case in CASES["full_size"]]
    assert len(names) == len(set(names)) >= 12
    for wanted in ("SD1.5 pure_bf16 adamw_8bit block", "SD1.5 fp32 adamw block", "SDXL pure_bf16 adamw_8bit block",
                   "SDXL pure_bf16 adamw_8bit block in backward"):  # fmt: skip
        assert wanted in names


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.usefixtures("one_process")
def test_a_real_run_takes_what_the_plan_says():
    case = next(case for case in CASES["shapes"] if case.name == "shapes fp32 adamw block")
    plan, real = bench_memory.planned(case), bench_memory.measured(case, cap_gib=24.0)
    rows = bench_memory.rows_of(case.name, plan, real, cap_gib=24.0)
    assert [row["stage"] for row in rows] == [*bench_memory.STAGES, "peak"]
    for row in rows:
        assert abs(row["error"]) < 0.02, row


def test_a_meter_charges_each_stage_with_its_own_peak():
    class Work:
        def outer(self) -> int:
            large = torch.zeros(1000)  # 4,000 bytes
            size = self.inner()
            del large
            return size

        def inner(self) -> int:
            return len(torch.zeros(3000))  # 12,000 bytes beside the 4,000

    work = Work()
    with StorageMeter() as meter:
        kept = torch.ones(10)  # 40 bytes
        meter.begin()
        meter.wrap(work, "outer", "outer")
        meter.wrap(work, "inner", "inner")
        assert work.outer() == 3000
    assert meter.peaks == {"outer": 4040, "inner": 16040}
    assert kept.sum() == 10


def test_what_fails_or_does_not_fit_is_told_and_not_counted():
    plan = {"stages": dict.fromkeys(bench_memory.STAGES, 10 * GIB)}
    real = {"stages": dict.fromkeys(bench_memory.STAGES, 10 * GIB) | {"update": 11 * GIB}, "reserved": 12 * GIB}
    rows = bench_memory.rows_of("runs", plan, real, 24.0)
    rows += bench_memory.rows_of("large", {"stages": {"update": 39 * GIB}}, {"out_of_memory": True}, 24.0)
    rows += bench_memory.rows_of("broken", plan, {"failed": "ImportError: no bitsandbytes"}, 24.0)
    summary = bench_memory.summarise(rows)
    assert (summary["measured"], summary["within_5_percent"]) == (1, 0)
    assert summary["misses"] == {"runs": pytest.approx(10 / 11 - 1, abs=1e-3)}
    assert summary["out_of_memory"] == {"large": "out of memory; the plan has 39.00 GiB and the cap is 24"}
    assert summary["failed"] == {"broken": "ImportError: no bitsandbytes"}
    assert next(row for row in rows if row["stage"] == "peak")["fragments_gib"] == 1


def test_a_wrong_case_and_time_that_is_over_are_said(tmp_path: Path):
    with pytest.raises(ValueError, match=r"only=fp32 is no case; give some of shapes pure_bf16"):
        bench_memory.run_cases(arguments("--only", "fp32"))
    name = "shapes LoRA 16 of bf16"
    assert bench_memory.run_cases(arguments("--only", name, "--seconds", "-1")) == ([], [name])


def test_what_was_measured_is_kept_when_a_later_case_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    names = [case.name for case in CASES["shapes"]][:2]
    stages = dict.fromkeys(bench_memory.STAGES, GIB)

    def child(command: list[str]) -> dict[str, Any]:
        if command[-2:] == ["--measure", names[1]]:
            raise KeyboardInterrupt
        return {"stages": stages}

    monkeypatch.setattr(bench_memory, "_child", child)
    with pytest.raises(KeyboardInterrupt):
        bench_memory.run_cases(arguments("--only", *names, "--out", str(tmp_path)))
    lines = (tmp_path / "memory.csv").read_text().splitlines()
    assert len(lines) == 1 + len(bench_memory.STAGES) + 1  # head, stages and peak of the first
    assert all(line.startswith(names[0]) for line in lines[1:])


def arguments(*words: str) -> argparse.Namespace:
    return bench_memory._parser().parse_args(["--cases", "shapes", *words])
