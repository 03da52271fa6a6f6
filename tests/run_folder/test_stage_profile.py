"""The profile of one iteration: its table on events written by hand, and that it does not disturb a run."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from torch.profiler import profile

from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.run_folder.stage_profile import Events, IterationProfile, Span, events_of, stage, stage_table
from rlcm_fast.trainer import Trainer

MS = 1_000_000  # nanoseconds
ALWAYS = {"encode", "sample", "decode", "reward_wait", "update_forward", "update_backward", "step", "other"}


def test_stages_without_a_gpu_are_host_seconds_and_the_rest_is_other():
    spans = [Span(0, 30 * MS, "sample"), Span(40 * MS, 50 * MS, "step"), Span(50 * MS, 60 * MS, "sample")]
    table = stage_table(3, 0.1, Events(spans))
    rows = [(row.stage, row.calls, round(row.seconds, 6), round(row.share, 6)) for row in table.stages]
    assert rows == [("sample", 2, 0.04, 0.4), ("step", 1, 0.01, 0.1), ("other", 1, 0.05, 0.5)]
    assert table.gpu_busy is None and {row.gpu_busy for row in table.stages} == {None}
    assert table.lines()[0] == "profile of iteration 3: 0.100 s"
    assert "GPU" not in "".join(table.lines())


def test_of_marks_inside_marks_the_outermost_counts():
    spans = [Span(0, 10 * MS, "evaluation"), Span(MS, 4 * MS, "sample"), Span(5 * MS, 6 * MS, "decode")]
    (row, _) = stage_table(1, 0.02, Events(spans)).stages
    assert (row.stage, row.calls) == ("evaluation", 1)


def test_a_kernel_belongs_to_the_stage_that_launched_it_however_late_it_runs():
    spans = [Span(0, 10 * MS, "update_forward"), Span(10 * MS, 20 * MS, "update_backward")]
    launches = {1: 2 * MS, 2: 4 * MS, 3: 12 * MS}
    # Two kernels of the forward pass with a gap between them, one of them when the host is in the backward pass.
    kernels = [(1, Span(5 * MS, 8 * MS)), (2, Span(11 * MS, 15 * MS)), (3, Span(15 * MS, 25 * MS))]
    table = stage_table(1, 0.05, Events(spans, launches, kernels))
    forward, backward = (
        next(row for row in table.stages if row.stage == name) for name in ("update_forward", "update_backward")
    )
    assert (forward.gpu_seconds, forward.gpu_busy) == (pytest.approx(0.010), pytest.approx(0.7))
    assert (backward.gpu_seconds, backward.gpu_busy) == (pytest.approx(0.010), pytest.approx(1.0))
    assert table.gpu_busy == pytest.approx(17 / 50)
    assert table.lines()[0].endswith("the GPU busy 34% of them")


def test_kernels_of_one_graph_launch_and_of_two_streams_are_counted_once():
    kernels = [(7, Span(0, 4 * MS)), (7, Span(2 * MS, 6 * MS)), (7, Span(8 * MS, 10 * MS))]
    table = stage_table(1, 0.01, Events([Span(0, MS, "update_graph")], {7: 0}, kernels))
    assert (table.gpu_busy, table.stages[0].gpu_busy) == (pytest.approx(0.8), pytest.approx(0.8))


def test_marks_cost_nothing_and_record_nothing_while_nothing_is_profiled():
    assert stage("sample") is stage("decode")
    with profile() as taken:
        pass
    with stage("sample"):
        torch.ones(2)
    assert events_of(taken).stages == []


def trained(model: str, run_dir: Path, **settings: object) -> Trainer:
    named = {"checkpoint.every": 1, "evaluation.every": 2, **settings}
    config = parse_config(tiny_runs.arguments(model, run_dir, named))
    validate(config, 1)
    trainer = Trainer(config)
    trainer.run()
    return trainer


@pytest.mark.usefixtures("one_process")
def test_a_profiled_run_has_the_same_bits_and_leaves_a_trace_and_a_table(tiny_lcm_folder: str, tmp_path: Path, capfd):
    trained(tiny_lcm_folder, tmp_path / "plain")
    trained(tiny_lcm_folder, tmp_path / "profiled", profile=3)
    assert tiny_runs.metrics(tmp_path / "plain") == tiny_runs.metrics(tmp_path / "profiled")
    plain, profiled = (
        load_file(tmp_path / name / "checkpoints" / "iteration_000003" / "unet.safetensors")
        for name in ("plain", "profiled")
    )
    assert all(torch.equal(weight, profiled[name]) for name, weight in plain.items())
    assert not (tmp_path / "plain" / "profile").exists()

    # The trace is of the third iteration, which begins with the second evaluation, after the second checkpoint.
    folder = tmp_path / "profiled" / "profile"
    trace = json.loads(gzip.decompress((folder / "iteration_000003.json.gz").read_bytes()))
    assert any(event.get("name") == "rlcm_fast: sample" for event in trace["traceEvents"])
    table = json.loads((folder / "iteration_000003_stages.json").read_text())
    assert {row["stage"] for row in table["stages"]} == ALWAYS | {"evaluation", "checkpoint"}
    assert sum(row["share"] for row in table["stages"]) == pytest.approx(1)
    assert table["gpu_busy"] is None
    said = capfd.readouterr().err
    assert f"profile of iteration 3: {table['seconds']:.3f} s" in said and "update_backward" in said


def test_a_profile_that_is_past_is_said_and_the_next_one_is_named(tmp_path: Path):
    lines: list[str] = []
    taken = IterationProfile(tmp_path, 2, lines.append)
    taken.begin_run(2)
    taken.end()
    assert lines == ["profile=2 was done before the run resumed; profile=4 is still to come"]
    assert list(tmp_path.iterdir()) == []


def test_a_profile_that_is_stopped_in_the_middle_is_dropped(tmp_path: Path):
    taken = IterationProfile(tmp_path, 1, lambda _: None)
    taken.begin_run(0)
    taken.close()
    taken.end()
    assert list(tmp_path.iterdir()) == []
    assert stage("sample") is stage("decode")


def test_a_profile_that_will_not_come_is_a_mistake(tmp_path: Path):
    with pytest.raises(ValueError, match=r"^profile=4 is past num_iterations=3; name one of them"):
        validate(parse_config(["--num_iterations=3", "--profile=4"]), 1)
