"""bench_full_size on a tiny model, and the random models that stand in for a download."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import arguments

from benchmarks.shared import tiny_pipelines
from benchmarks.shared.device_clock import DeviceClock
from benchmarks.shared.random_models import random_pipeline, random_weights
from benchmarks.shared.reporting import machine
from benchmarks.speed import bench_full_size
from benchmarks.speed.full_size_tables import TABLES, earlier_rows, put_rows
from rlcm_fast.backbones.loading import SHIPPED
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import LoraConfig, ModelConfig, parse_config, to_yaml
from rlcm_fast.planner.architecture import Architecture, load_architecture
from rlcm_fast.trajectory import Prompt


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of bench_full_size on a tiny model: 4 images of 3 steps and 2 actions, micro-batches of 2."""
    model = tiny_pipelines.save_lcm(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_text(to_yaml(parse_config(arguments(model, tmp_path / "run", {"update.num_updates": 1}))))
    words = ["--modes", "off", "--samples", "4", "--pairs", "2", "--micro-batch-sizes", "4", "--inference-steps", "2"]
    return ["--config", str(config), *words, "--out", str(tmp_path / "out")]


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.usefixtures("one_process")
def test_an_iteration_is_measured_beside_its_bare_passes(command: list[str], tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_full_size.py", *command])
    assert bench_full_size.main() == 0
    first, summary = (json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{"))
    assert (first["modes"], first["left_out"]) == (summary["modes"], ["micro-batches of 4"])
    (row,) = summary["modes"]
    assert row["overhead"] > 0.5
    assert row["bare_seconds"] <= row["full_seconds"] * 2
    assert 0 < row["update_mfu"] < row["update_hfu"] < 1.2 * row["update_mfu"]  # attention's scores are formed again
    assert row["full_seconds_q1"] <= row["full_seconds"] <= row["full_seconds_q3"]
    assert sum(row[f"{key}_seconds"] for key in ("sampling", "decode", "update")) < 1.2 * row["full_seconds"]
    of_transition = summary["gflop_per_transition"]
    flop = 1e9 * of_transition["forward"] * 4 * 3
    assert row["sampling_mfu"] == pytest.approx(flop / row["sampling_seconds"] / row["matmul_tflops"] / 1e12)
    assert summary["flops_count"].startswith("paper: ") and row["gpu_busy"] is None
    assert {"sample", "decode", "update_forward", "update_backward", "step"} <= {s["stage"] for s in summary["stages"]}
    assert 0 <= row["ratio_noise_median"] <= row["ratio_noise_p90"] <= row["ratio_noise_max"] < 1e-5
    assert [each["num_steps"] for each in summary["inference"]] == [2]
    assert [each["micro_batch_size"] for each in summary["micro_batches"]] == [4]
    assert summary["left_out"] == []
    for name in ("full_size", "full_size_stages", "full_size_inference", "full_size_micro_batches"):
        with (tmp_path / "out" / f"{name}.csv").open() as file:
            assert list(csv.DictReader(file))


@pytest.mark.usefixtures("one_process")
def test_what_time_did_not_allow_is_named(command: list[str]):
    parsed = bench_full_size._parser().parse_args([*command, "--seconds", "-1"])
    (summary,) = bench_full_size.measure(bench_full_size._config(parsed), parsed)
    assert summary["left_out"] == ["engine.compile=off", "micro-batches of 4"]


def test_samples_that_an_update_cannot_divide_are_one_line(command: list[str], monkeypatch, capsys):
    override = ["--override", "update.micro_batch_size", "8"]  # divides the config's 8 transitions; 2 images have 4
    monkeypatch.setattr(sys, "argv", ["bench_full_size.py", *command, "--samples", "2", *override])
    assert bench_full_size.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: update.micro_batch_size=8 does not divide")


def test_work_that_runs_is_more_than_work_that_is_needed():
    options = ["--engine.recompute=block", "--update.kl_weight=0.1"]
    plain, more = (bench_full_size.flops_of(parse_config(words)) for words in ([], options))
    assert plain["paper"] == more["paper"] <= plain["executed"]
    assert 2.5 * plain["forward"] < plain["paper"] <= 3 * plain["forward"]
    assert more["executed"] > plain["paper"] + 1.5 * plain["forward"]  # one recomputation, one pass of the reference


@pytest.mark.slow
def test_the_paper_count_of_sd15_is_the_documented_one():
    flops = bench_full_size.flops_of(parse_config(["--config", "configs/sd15_lcm/full_24gb.yaml"]))
    assert [round(flops[name] / 1e9) for name in ("forward", "paper", "executed")] == [803, 2407, 2470]


def test_a_slice_keeps_the_rows_of_other_modes_of_the_same_measurement(tmp_path: Path):
    summary = {"config": "c", "samples": 4}
    assert earlier_rows(tmp_path / "none.json", summary) == {key: [] for key, _ in TABLES.values()}
    modes = [{"compile": "off", "full_seconds": 1.0}, {"compile": "whole", "full_seconds": 2.0}]
    (tmp_path / "a.json").write_text(json.dumps({**summary, "machine": machine(), "modes": modes}))
    found: dict[str, Any] = dict(earlier_rows(tmp_path / "a.json", summary))
    assert (found["modes"], found["stages"]) == (modes, [])
    put_rows(found, "modes", [{"compile": "off", "full_seconds": 3.0}])
    assert [(row["compile"], row["full_seconds"]) for row in found["modes"]] == [("whole", 2.0), ("off", 3.0)]
    assert earlier_rows(tmp_path / "a.json", {**summary, "samples": 8})["modes"] == []
    assert earlier_rows(tmp_path / "a.json", {**summary, "machine": "another"})["modes"] == []


def test_the_clock_adds_up_calls_and_forgets_what_was_read():
    class Work:
        def double(self, value: int) -> int:
            return 2 * value

    work, clock = Work(), DeviceClock()
    clock.wrap(work, "double", "doubling")
    assert [work.double(1), work.double(2)] == [2, 4]
    (seconds,) = clock.read().values()
    assert 0 < seconds < 1
    assert clock.read() == {}


def with_vocabulary_of_clip(architecture: Architecture) -> Architecture:
    encoders = tuple({**config, "vocab_size": 49408} for config in architecture.text_encoders)
    return replace(architecture, text_encoders=encoders)


@pytest.mark.parametrize("kind", ["lcm", "sdxl"])
def test_a_random_model_draws_images_like_a_loaded_one(kind: str, tmp_path: Path, monkeypatch):
    save = {"lcm": tiny_pipelines.save_lcm, "sdxl": tiny_pipelines.save_sdxl}[kind]
    architecture = with_vocabulary_of_clip(load_architecture(save(tmp_path / kind)))
    pipeline = random_pipeline(architecture, torch.bfloat16, "cpu")
    monkeypatch.setattr("benchmarks.shared.random_models.load_architecture", lambda path: architecture)
    monkeypatch.setattr("benchmarks.shared.random_models.random_pipeline", lambda *_: pipeline)
    with random_weights("cpu"):  # some/model is no folder, so nothing is loaded
        backbone = Backbone.load(ModelConfig("some/model"), torch.device("cpu"), torch.bfloat16, kind="consistency")
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in backbone.unet.parameters())
    assert {p.dtype for part in backbone.frozen_parts for p in part.parameters()} == {torch.float32}
    conditioning = backbone.encode([Prompt("a red circle")], with_negative=False)
    assert conditioning.embeds.shape[1] == architecture.num_tokens
    assert (conditioning.time_ids is None) == (kind == "lcm")
    assert backbone.decode(torch.zeros(1, 4, 8, 8)).shape == (1, 3, 16, 16)
    backbone.add_adapters(LoraConfig(rank=2))


def test_a_folder_is_loaded_as_ever():
    with random_weights("cpu"):
        backbone = Backbone.load(ModelConfig("shapes/lcm"), torch.device("cpu"), torch.float32, kind="consistency")
    loaded = Backbone.load(ModelConfig("shapes/lcm"), torch.device("cpu"), torch.float32, kind="consistency")
    assert SHIPPED["shapes/lcm"].is_dir()
    assert all(torch.equal(a, b) for a, b in zip(backbone.unet.parameters(), loaded.unet.parameters(), strict=True))
