"""bench_full_size on a tiny model, and the random models that stand in for a download."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_runs import arguments

from benchmarks.shared import tiny_pipelines
from benchmarks.shared.random_models import random_pipeline, random_weights
from benchmarks.speed import bench_full_size
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
    words = ["--modes", "off", "--samples", "4", "--pairs", "1", "--micro-batch-sizes", "4"]
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
    assert 0 < row["update_mfu"] == pytest.approx(row["update_hfu"])  # nothing is recomputed
    assert row["update_seconds"] + row["rollout_seconds"] == pytest.approx(row["full_seconds"], rel=0.5)
    assert 0 <= row["ratio_noise_median"] <= row["ratio_noise_p90"] <= row["ratio_noise_max"] < 1e-5
    assert [each["num_steps"] for each in summary["inference"]] == [2, 4, 8]
    assert [each["micro_batch_size"] for each in summary["micro_batches"]] == [4]
    assert summary["left_out"] == []
    for name in ("full_size", "full_size_inference", "full_size_micro_batches"):
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
    assert plain["model"] == plain["executed"] == more["model"]
    assert 2.5 * plain["forward"] < plain["model"] < 3.1 * plain["forward"]
    assert more["executed"] > plain["model"] + 1.5 * plain["forward"]  # one recomputation, one pass of the reference


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
