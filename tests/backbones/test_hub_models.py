"""Models on a hub: their configs are checked before their weights are downloaded, as those of a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from model_hub import COMMIT, ModelHub

from rlcm_fast import hub as asked_hub
from rlcm_fast.backbones.model_checks import check_hub
from rlcm_fast.config import LoraSource, ModelConfig

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def hub(tmp_path: Path, tiny_sd_folder: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A hub with the model me/model, and an empty cache."""
    folder = Path(shutil.copytree(tiny_sd_folder, tmp_path / "on_hub"))
    with ModelHub({"me/model": folder}) as found:
        settings = {
            "ENDPOINT": found.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
        }
        for name, value in settings.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        asked_hub.is_reachable.cache_clear()
        yield found


def change(folder: Path, file: str, **fields: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def refusal_of(model: ModelConfig) -> str:
    with pytest.raises(ValueError) as caught:
        check_hub(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BROKEN = {
    "unet/config.json": {"in_channels": 9},
    "vae/config.json": {"scaling_factor": 0.0},
    "text_encoder/config.json": {"hidden_size": 7},
    "tokenizer/tokenizer_config.json": {"model_max_length": 999},
    "model_index.json": {"vae": ["diffusers", "AutoencoderKLWan"]},
}


@pytest.mark.parametrize("file", BROKEN)
def test_a_config_on_a_hub_is_refused_before_weights_are_downloaded(hub: ModelHub, file: str):
    change(hub.folders["me/model"], file, **BROKEN[file])
    message = refusal_of(ModelConfig("me/model"))
    assert message.startswith("model.path=me/model ") and next(iter(BROKEN[file])) in message
    assert file.rpartition("/")[2] in {name.rpartition("/")[2] for name in hub.sent} and hub.weights_sent == []


def test_a_good_model_sends_its_configs_alone(hub: ModelHub):
    check_hub(ModelConfig("me/model"))
    assert hub.sent and all(name.endswith(("config.json", "model_index.json")) for name in hub.sent)
    hub.sent.clear()
    check_hub(ModelConfig("me/model"))  # they are in the cache
    assert hub.sent == []


def test_parts_on_a_hub_are_compared_with_those_of_a_folder(
    hub: ModelHub, tiny_sd_folder: str, tiny_sdxl_folder: str, tiny_unet_folder: str
):
    hub.folders |= {"me/vae": Path(tiny_sd_folder) / "vae", "me/unet": Path(tiny_unet_folder)}
    check_hub(ModelConfig(tiny_sd_folder, vae="me/vae"))
    check_hub(ModelConfig("me/unet", base=tiny_sdxl_folder))
    assert "me/unet has a UNet for two text encoders" in refusal_of(ModelConfig("me/unet", base="me/model"))
    change(hub.folders["me/model"] / "vae", "config.json", scaling_factor=-1)
    hub.folders["me/broken"] = hub.folders["me/model"] / "vae"
    assert refusal_of(ModelConfig(tiny_sd_folder, vae="me/broken")).startswith(
        "model.vae=me/broken could not be loaded"
    )
    assert hub.weights_sent == []


def test_a_lora_on_a_hub_has_no_config(hub: ModelHub, tiny_sd_folder: str):
    check_hub(ModelConfig(tiny_sd_folder, lora="me/model", loras=[LoraSource("me/model")]))
    assert hub.sent == []


def test_a_revision_is_that_of_the_configs(hub: ModelHub):
    check_hub(ModelConfig("me/model", revision=COMMIT))
    message = refusal_of(ModelConfig("me/model", revision="banana"))
    assert message == (
        "model.path=me/model could not be loaded: it has no revision banana; check the revision, or leave it out"
    )


def test_a_model_that_the_hub_does_not_have_is_said(hub: ModelHub):
    assert refusal_of(ModelConfig("me/nothing")) == (
        "model.path=me/nothing could not be loaded: the hub has no such model, or it is private; check the name, or run"
        " `hf auth login`"
    )


def ended(argv: list[str], hub: ModelHub, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command of its own process, with the hub and an empty cache."""
    environment = tiny_runs.clean_environment(OMP_NUM_THREADS="1", HF_ENDPOINT=hub.url, HF_HOME=str(folder / "home"))
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False
    )


TRAIN = str(ROOT / "rlcm_fast" / "train.py")
SAMPLE = ["-m", "rlcm_fast.cli.main", "sample", "--prompt=a", "--num-images=1", "--num-steps=1", "--model=me/model"]


def train_argv(folder: Path, prompts_in: str) -> list[str]:
    """A tiny run of the hub's model; prompts_in: a folder that may be written to."""
    return [TRAIN, *tiny_runs.arguments(prompts_in, folder / "run", {"num_iterations": 1, "model.path": "me/model"})]


def test_train_and_sample_end_in_one_line_before_the_download(hub: ModelHub, tmp_path: Path, tiny_sd_folder: str):
    change(hub.folders["me/model"], "vae/config.json", latents_mean=[0.1, 0.2, 0.3, 0.4])
    for argv in (train_argv(tmp_path, tiny_sd_folder), SAMPLE):
        done = ended(argv, hub, tmp_path)
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "latents_mean=[0.1, 0.2, 0.3, 0.4]" in line, done.stderr
    assert hub.sent and hub.weights_sent == []


@pytest.mark.slow
def test_a_model_of_a_hub_is_trained(hub: ModelHub, tmp_path: Path, tiny_sd_folder: str):
    done = ended(train_argv(tmp_path, tiny_sd_folder), hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(hub.weights_sent) == 3 and len(hub.sent) == len(set(hub.sent))
