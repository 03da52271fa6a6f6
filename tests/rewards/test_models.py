"""Files of models: found in folders and in the hub's cache, missing ones named in one line, used ones recorded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from rlcm_fast.rewards.facts import SHARDS, Facts, Weights
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, check_files

WEIGHTS = Weights("owner/default", ("config.json", SHARDS, "merges.txt?"), 1.71, "MIT")
COMMIT = "a" * 40


def files(source: object) -> ModelFiles:
    return ModelFiles("model", str(source), WEIGHTS)


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def fill_cache(cache: Path, *names: str) -> Path:
    model = cache / "models--owner--name"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    return fill(model / "snapshots" / COMMIT, *names)


def test_a_folder_with_the_files_is_found(tmp_path: Path):
    folder = fill(tmp_path, "config.json", "model.safetensors")
    assert files(folder).find() == files(folder).folder() == folder
    assert files(folder).file() == folder / "config.json"


def test_a_missing_file_of_a_folder_is_named_with_its_origin_size_and_licence(tmp_path: Path):
    with pytest.raises(ValueError) as caught:
        files(fill(tmp_path, "config.json")).find()
    assert str(caught.value) == (
        f"model={tmp_path} lacks model.safetensors or model.safetensors.index.json or pytorch_model.bin; it "
        "comes from the Hugging Face hub (owner/default), 1.7 GB, licence MIT"
    )


def test_a_missing_shard_is_named(tmp_path: Path):
    folder = fill(tmp_path, "config.json", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"lacks b\.safetensors; it comes from"):
        files(folder).find()


@pytest.mark.parametrize("source", ["no/such/folder", "/no/folder", "./no", "head.pth"])
def test_a_path_that_does_not_exist_is_no_hub_id(source: str):
    with pytest.raises(ValueError, match=f"model={source} does not exist; give a folder, or a hub id"):
        files(source).find()


def test_a_file_is_taken_only_for_a_model_of_one_file(tmp_path: Path):
    folder = fill(tmp_path, "config.json", "head.pth")
    head = ModelFiles("head", str(folder / "head.pth"), Weights("", ("other_name.pth",), 0.004, "MIT"))
    assert head.find() == head.file() == folder / "head.pth"
    assert head.used() == {
        "model": str(folder / "head.pth"),
        "revision": None,
        "files": {"head.pth": {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}},
    }
    with pytest.raises(ValueError, match="is a file; give the folder; it comes from"):
        files(folder / "config.json").find()


def test_checking_begins_no_cuda_context(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """It would take half a GB of the first GPU, on every process."""

    def refuse() -> int:
        raise AssertionError("this would begin a CUDA context")

    monkeypatch.setattr("torch.cuda.current_device", refuse)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    model = str(fill(tmp_path, "config.json", "model.safetensors"))
    assert check_files(Scorer, {"model": model, "device": "same"}) == []


def test_an_empty_source_asks_for_the_file():
    with pytest.raises(ValueError, match="model= is empty; give the file: it comes from"):
        files("").find()


@pytest.mark.parametrize("source", ["owner/name", f"owner/name@{COMMIT}"])
def test_a_model_in_the_cache_needs_no_network(source: str, cache: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this would ask the network")

    monkeypatch.setattr("rlcm_fast.rewards.models.snapshot_download", refuse)
    folder = fill_cache(cache, "config.json", "model.safetensors")
    assert files(source).folder() == folder
    assert files(source).used()["revision"] == COMMIT


def test_a_model_to_download_is_said_with_its_size_and_is_no_error(cache: Path):
    fill_cache(cache, "config.json")  # the weights are missing
    assert files("owner/name").find() is None
    assert files("owner/name").download() == "owner/name, of unknown size and licence"
    assert files("owner/default@v1").download() == "owner/default@v1, 1.7 GB, licence MIT"


def test_offline_a_model_that_is_not_in_the_cache_is_refused_with_the_command(
    cache: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; .* MIT; run .hf download owner/name config.json mod"):
        files("owner/name@v1").find()


@pytest.mark.usefixtures("cache")
def test_a_failed_download_is_one_line(monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise OSError("no network\nand a long story")

    monkeypatch.setattr("rlcm_fast.rewards.models.model_info", fail)
    with pytest.raises(
        ValueError, match=r"model=owner/name cannot be downloaded: no network and a long story; it"
    ) as caught:
        files("owner/name").folder()
    assert "\n" not in str(caught.value)


def test_a_download_asks_for_the_needed_files_at_the_revision(cache: Path, monkeypatch: pytest.MonkeyPatch):
    asked: dict[str, Any] = {}

    def download(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        return str(fill(cache / "there", "config.json", "model.safetensors"))

    monkeypatch.setattr("rlcm_fast.rewards.models.snapshot_download", download)
    there = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin"]

    def listed(*_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in there])

    monkeypatch.setattr("rlcm_fast.rewards.models.model_info", listed)
    files("owner/name@v1").folder()
    assert (asked["repository"], asked["revision"]) == ("owner/name", "v1")
    assert asked["patterns"] == ["config.json", "model.safetensors"]
    there[2:] = ["model.safetensors.index.json", "merges.txt"]
    files("owner/name@v1").folder()
    assert asked["patterns"] == ["config.json", "model.safetensors.index.json", "merges.txt", "model-*.safetensors"]


def test_what_was_used_has_sizes_and_hashes(tmp_path: Path):
    used = files(fill(tmp_path, "config.json", "model.safetensors")).used()
    assert used["model"] == str(tmp_path) and used["revision"] is None
    assert used["files"]["config.json"] == {"bytes": 2, "sha256": hashlib.sha256(b"{}").hexdigest()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp64", "cpu", 1), "dtype=fp64 is unknown; give fp32, bf16, fp16"),
        (("fp32", "gpu", 1), "device=gpu is unknown; give same, cpu or cuda:N"),
        (("fp32", "cuda:64", 1), "device=cuda:64 is not there: this process sees"),
        (("fp32", "cpu", 0), "batch_size=0 is no number of images"),
    ],
)
def test_a_wrong_placement_names_the_argument(arguments: tuple[str, str, int], message: str):
    with pytest.raises(ValueError, match=message):
        Placement.of(*arguments)


class Scorer(OnModels):
    FACTS = Facts("x", "x", (WEIGHTS,))

    def __init__(
        self, model: str = "owner/name", dtype: str = "fp32", device: str = "cpu", batch_size: int = 2
    ) -> None:
        raise AssertionError("weights would load")

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        return [files(arguments["model"])]


@pytest.mark.usefixtures("cache")
def test_files_are_checked_without_making_the_reward(tmp_path: Path):
    assert check_files(Scorer, {}) == ["owner/name, of unknown size and licence"]
    assert check_files(Scorer, {"model": str(fill(tmp_path / "m", "config.json", "model.safetensors"))}) == []
    assert check_files(Scorer, {"modle": ""}) == []  # its constructor will say it better
    with pytest.raises(ValueError, match="dtype=half is unknown"):
        check_files(Scorer, {"dtype": "half"})
    assert check_files(torch.nn.Identity, {}) == []


def test_facts_sum_up_their_models():
    assert Facts("x", "x", (WEIGHTS, WEIGHTS)).gigabytes == pytest.approx(3.42)
