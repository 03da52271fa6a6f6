"""A script written for TRL 0.23's DDPOTrainer runs with one import changed, and finds what it expects."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from rlcm_fast.compat import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline
from rlcm_fast.compat import trainer as room
from rlcm_fast.compat.samples import Samples

SCRIPT = (Path(__file__).parent.parent / "support" / "ddpo_script.py").read_text()
OPTIONS = {
    "num_epochs": 2,
    "mixed_precision": "no",
    "sample_num_steps": 3,
    "sample_batch_size": 2,
    "sample_num_batches_per_epoch": 2,
    "train_learning_rate": 1e-3,
    "seed": 5,
}


@pytest.fixture(scope="module", params=[pytest.param(False, marks=pytest.mark.slow), True], ids=["weights", "lora"])
def script(request: pytest.FixtureRequest, tiny_sd_folder: str, tmp_path_factory: pytest.TempPathFactory):
    """What the script leaves in its folder, and its names."""
    folder = tmp_path_factory.mktemp("script")
    shutil.copytree(tiny_sd_folder, folder / "model")
    scope: dict[str, Any] = {"USE_LORA": request.param}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(sys, "argv", ["ddpo.py", *(f"--{name}={value}" for name, value in OPTIONS.items())])
        exec(SCRIPT.replace("from trl import", "from rlcm_fast.compat import"), scope)  # noqa: S102
        yield folder, scope


def test_the_script_trains_and_its_hook_sees_every_epoch_with_trls_prompts(script: tuple[Path, dict[str, Any]]):
    folder, scope = script
    # What TRL 0.23.1 drew, with this script and seed.
    prompts = [["monkey", "horse", "monkey", "dog"], ["horse", "horse", "cat", "dog"]]
    assert scope["logged"] == [(0, prompts[0]), (4, prompts[1])]  # 4 updates an epoch
    lines = [json.loads(line) for line in (folder / "save" / "metrics.jsonl").read_text().splitlines()]
    assert [line["queries"] for line in lines] == [4, 8]
    assert lines[0]["lr"] == 1e-3
    assert sorted(os.listdir(folder / "save" / "samples")) == ["000000.png", "000004.png"]


def test_the_saved_folder_draws_what_the_scripts_pipeline_draws(script: tuple[Path, dict[str, Any]]):
    folder, scope = script
    loaded: Any = DiffusionPipeline.from_pretrained(folder / "tuned")
    start: Any = DiffusionPipeline.from_pretrained(folder / "model")
    if scope["USE_LORA"]:
        loaded.load_lora_weights(folder / "tuned")

    def drawn(pipeline: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipeline("cat", num_inference_steps=3, generator=generator, output_type="pt").images

    torch.testing.assert_close(drawn(loaded), drawn(scope["pipeline"]), atol=0, rtol=0)
    assert not torch.equal(drawn(loaded), drawn(start))
    assert (folder / "tuned" / "README.md").is_file()


@pytest.mark.slow
def test_more_epochs_go_on_in_the_pipeline_that_the_script_holds(script: tuple[Path, dict[str, Any]]):
    _, scope = script
    held = scope["pipeline"].sd_pipeline
    before = {name: weight.clone() for name, weight in held.unet.state_dict().items()}
    scope["trainer"].train(epochs=1)
    assert scope["pipeline"].sd_pipeline is held
    now = held.unet.state_dict()
    assert any(not torch.equal(now[name], before[name]) for name in now if name in before)
    assert [step for step, _ in scope["logged"]] == [0, 4, 8]


class Hub:
    """Stands in for huggingface_hub."""

    def __init__(self, token: str | None = None) -> None:
        self.calls: list[Any] = []

    def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> Any:
        return type("Repo", (), {"repo_id": f"me/{repo_id}"})

    def upload_folder(self, repo_id: str, folder_path: str, **settings: Any) -> str:
        return f"{repo_id} {len(os.listdir(folder_path)) > 5} {settings['revision']}"


def test_the_result_goes_to_the_hub_with_its_card(script: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch):
    folder, scope = script
    monkeypatch.setattr(room, "HfApi", Hub)
    assert scope["trainer"].push_to_hub("cats", branch="next") == "me/cats True next"
    scope["trainer"].create_model_card("Cats", dataset_name="me/animals", tags="cats")
    scope["trainer"].save_pretrained(folder / "again")
    card = (folder / "again" / "README.md").read_text()
    assert "\n# Cats\n" in card and "- ddpo\n- cats\n" in card and "datasets:\n- me/animals\n" in card


@pytest.mark.slow
def test_a_pipeline_that_the_script_changed_is_trained_as_it_is(tiny_sd_folder: str, tmp_path: Path):
    pipeline = DefaultDDPOStableDiffusionPipeline(tiny_sd_folder, use_lora=False)
    with torch.no_grad():
        pipeline.unet.conv_in.weight.add_(1.0)
    changed = pipeline.unet.conv_in.weight.clone()
    settings = {**OPTIONS, "num_epochs": 1, "train_learning_rate": 1e-6}
    config = DDPOConfig(**settings, project_kwargs={"project_dir": str(tmp_path / "run")})
    trainer = DDPOTrainer(
        config, lambda images, prompts, _: (images.mean((1, 2, 3)), {}), lambda: ("cat", {}), pipeline
    )
    random.seed(0)
    trainer.train()
    torch.testing.assert_close(pipeline.unet.conv_in.weight, changed, atol=1e-4, rtol=0)
    assert "start_model_" in (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"step\(0, 0\) is not offered; train\(epochs=1\) trains one epoch more"):
        trainer.step(0, 0)


def test_batches_come_in_the_order_of_their_prompts_with_their_metadata():
    counted = iter(range(4))
    samples = Samples(lambda: ("cat", next(counted)), lambda images, texts, metadata: (list(metadata), texts), True)
    prompts = [samples.draw() for _ in range(4)]
    images = torch.zeros(2, 3, 4, 4)
    assert samples(images, prompts[2:]).tolist() == [2.0, 3.0]  # another thread was faster
    assert samples(images, prompts[:2]).tolist() == [0.0, 1.0]
    assert [batch[2] for batch in samples.end_of_epoch()] == [(0, 1), (2, 3)]
    assert samples.end_of_epoch() == []


@pytest.mark.parametrize(
    ("prompt", "reward", "message"),
    [
        (lambda: "cat", lambda *_: ([0.0], {}), r"prompt_function returned 'cat'; return \(prompt, metadata\)"),
        (lambda: ("cat", {}), lambda *_: [0.0], r"reward_function returned a list; return \(scores, information\)"),
    ],
)
def test_functions_with_other_answers_are_worded(prompt: Any, reward: Any, message: str):
    samples = Samples(prompt, reward, False)
    with pytest.raises(ValueError, match=message):
        samples(torch.zeros(1, 3, 4, 4), [samples.draw()])


def test_another_kind_of_pipeline_is_refused(tiny_sd_folder: str):
    with pytest.raises(ValueError, match="sd_pipeline is a str; give a DefaultDDPOStableDiffusionPipeline"):
        DDPOTrainer(DDPOConfig(), lambda *_: ([], {}), lambda: ("cat", {}), tiny_sd_folder)  # pyright: ignore[reportArgumentType]
