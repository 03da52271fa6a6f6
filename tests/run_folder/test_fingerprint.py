"""What a checkpoint notes of a config and of the files of its model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlcm_fast.config import Config, ModelConfig, RewardConfig, TaskConfig
from rlcm_fast.run_folder import fingerprint as fingerprints
from rlcm_fast.run_folder.fingerprint import changed_files, fingerprint, flat, model_files, rule_name

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def model(tiny_lcm_folder: str, tmp_path: Path) -> ModelConfig:
    """A model of its own, which a test may change."""
    return ModelConfig(path=str(shutil.copytree(tiny_lcm_folder, tmp_path / "model")))


def test_every_field_has_a_name_and_items_of_lists_are_named(tmp_path: Path):
    rewards = [RewardConfig("jpeg"), RewardConfig("p:R", arguments={"a": (1, 2)})]
    names = flat(replace(Config(), rewards=rewards, tasks=[TaskConfig("t", "shapes:one", rewards[:1])]))
    assert names["rewards[jpeg].weight"] == 1.0
    assert names["rewards[p:R].arguments"] == {"a": [1, 2]}
    assert names["tasks[t].rewards[jpeg].credit"] == "group"
    assert names["optimizer.betas"] == [0.9, 0.999]
    assert not {"rewards", "tasks", "evaluation.rewards"} & names.keys()
    assert rule_name("tasks[t].rewards[p:R].credit") == "tasks[].rewards[].credit"
    assert json.loads(json.dumps(names)) == names


def test_the_fingerprint_leaves_out_silent_fields_and_survives_json():
    taken = fingerprint(Config(), {"run_dir"}, 2)
    assert "run_dir" not in taken["fields"]
    assert taken["tasks"]["default"]["prompts"] == [0, "shapes:one", 16, 0]
    assert json.loads(json.dumps(taken)) == taken
    assert fingerprint(Config(), {"run_dir"}, 1) == taken, "it does not depend on the number of processes"


def test_a_model_has_the_files_that_diffusers_may_load(model: ModelConfig):
    (Path(model.path) / "prompts.txt").write_text("no file of the model")
    files = model_files(model)["pipeline"]
    assert {"model_index.json", UNET, "unet/config.json", "scheduler/scheduler_config.json"} <= files.keys()
    assert "prompts.txt" not in files
    assert files[UNET].keys() == {"size", "mtime_ns", "header"}
    assert model_files(replace(model, hash_files=True))["pipeline"][UNET].keys() == {*files[UNET], "sha256"}


def changed_weight(model: ModelConfig) -> None:
    """Changes a weight in place: same size, same header; another time."""
    file = Path(model.path) / UNET
    weights, before = load_file(file), file.stat()
    first = min(weights)
    save_file({**weights, first: weights[first] + 1}, file, metadata={"format": "pt"})
    assert file.stat().st_size == before.st_size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9))


@pytest.mark.parametrize("with_hash", [False, True])
def test_a_weight_changed_in_place_has_another_time_and_another_hash(model: ModelConfig, with_hash: bool):
    model = replace(model, hash_files=with_hash)
    before = model_files(model)
    changed_weight(model)
    expected = ([f"pipeline {UNET} (other contents)"], []) if with_hash else ([], [f"pipeline {UNET}"])
    assert changed_files(before, model_files(model)) == expected


def test_a_copy_differs_in_nothing_with_hashes_and_in_times_without(model: ModelConfig, tmp_path: Path):
    copied = replace(model, path=str(shutil.copytree(model.path, tmp_path / "copy", copy_function=shutil.copyfile)))
    changed, touched = changed_files(model_files(model), model_files(copied))
    assert changed == []
    assert len(touched) > 3
    hashed = (model_files(replace(one, hash_files=True)) for one in (model, copied))
    assert changed_files(*hashed) == ([], [])


def test_other_tensors_other_sizes_new_and_missing_files_are_found(model: ModelConfig):
    before, folder = model_files(model), Path(model.path)
    size = (folder / UNET).stat().st_size
    save_file({"weight": torch.zeros(3)}, folder / UNET)
    (folder / "vae" / "extra.json").write_text("{}")
    (folder / "unet" / "config.json").unlink()
    changed, _ = changed_files(before, model_files(model))
    assert changed == [
        "pipeline unet/config.json (gone)",
        f"pipeline {UNET} ({size} bytes, now {(folder / UNET).stat().st_size})",
        "pipeline vae/extra.json (new)",
    ]


def test_the_hub_is_known_by_its_commit(monkeypatch: pytest.MonkeyPatch):
    commits = iter(["abc", "def", None])
    monkeypatch.setattr(fingerprints, "_commit", lambda *place: next(commits))
    hub = ModelConfig(path="someone/some-model")
    one, other, unknown = (model_files(hub) for _ in range(3))
    assert changed_files(one, other) == (["pipeline commit (commit abc, now def)"], [])
    assert changed_files(one, unknown) == ([], [])


def test_a_unet_and_a_lora_are_parts_of_their_own(
    tiny_sdxl_folder: str, tiny_unet_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lora = tmp_path / "lora.safetensors"
    save_file({"a": torch.zeros(1)}, lora)
    asked: list[Any] = []
    monkeypatch.setattr(fingerprints, "_commit", lambda *place: asked.append(place) or "abc")
    files = model_files(ModelConfig(path=tiny_unet_folder, base="someone/base", lora=str(lora), revision="v1"))
    assert files["unet"].keys() >= {"config.json", "diffusion_pytorch_model.safetensors"}
    assert files["lora"].keys() == {"lora.safetensors"}
    assert files["pipeline"] == {"commit": {"id": "abc"}}
    assert asked[-1] == ("someone/base", "model_index.json", None), "a revision is that of the UNet"
