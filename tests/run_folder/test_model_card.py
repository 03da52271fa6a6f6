"""Model cards: their code runs, and they name no folder of this machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import EulerDiscreteScheduler, LCMScheduler, PNDMScheduler, TCDScheduler

from benchmarks.shared import tiny_pipelines
from rlcm_fast.config import parse_config
from rlcm_fast.run_folder.model_card import Card, diffusers_usage, lora_usage

BETAS = tiny_pipelines.BETAS
CASES: dict[str, tuple[Any, list[str], str]] = {
    "consistency": (
        LCMScheduler(**BETAS),
        ["--policy.timesteps=[999,749,249]"],
        'pipeline("...", timesteps=[999, 749, 249], guidance_scale=4).images',
    ),
    "tcd": (
        TCDScheduler(**BETAS),
        ["--policy.eta=0.3", "--policy.num_steps=2"],
        "num_inference_steps=2, guidance_scale=4, eta=0.3)",
    ),
    "ddim": (
        PNDMScheduler(**BETAS, skip_prk_steps=True),
        [],
        "pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)",
    ),
    "euler_ancestral": (
        EulerDiscreteScheduler(**BETAS),
        ["--policy.timesteps=[999,499]"],
        "EulerAncestralDiscreteScheduler takes no named timesteps: `rlcm-fast sample --model",
    ),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", CASES)
def test_the_code_of_a_card_draws_an_image_with_the_trained_sampler(kind: str, tmp_path: Path):
    scheduler, settings, expected = CASES[kind]
    folder = tiny_pipelines.save_sd(tmp_path, scheduler)
    config = parse_config([f"--policy.kind={kind}", *settings])
    usage = diffusers_usage(config, folder, type(scheduler).__name__)
    assert expected in usage
    names: dict[str, Any] = {}
    exec(usage.split("```python\n")[1].split("```")[0].replace('"..."', '"a star"'), names)  # noqa: S102
    assert names["image"].size == (16, 16)


def test_a_card_names_files_without_their_folders(tmp_path: Path):
    prompts = tmp_path / "secret" / "prompts.txt"
    prompts.parent.mkdir()
    prompts.write_text("a star\n")
    given = ["--model.path", str(tmp_path / "secret" / "mine.safetensors"), "--policy.kind", "consistency"]
    config = parse_config([*given, "--prompts.source", str(prompts), "--model.lora", str(tmp_path / "lcm.safetensors")])
    Card(tmp_path, config, 3, lora_usage(config)).write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert str(tmp_path.parent) not in text and "secret" not in text
    assert "`mine.safetensors`, fine-tuned" in text and "| prompts | prompts.txt |" in text
    assert "| LoRAs in the base | lcm.safetensors |" in text


def test_a_shipped_model_has_the_licence_of_the_package(tmp_path: Path):
    config = parse_config(["--config", "shapes/compressibility", "--policy.kind", "consistency"])
    for path, licence in (("shapes/lcm", "apache-2.0"), ("me/model", "other")):
        changed = replace(config, model=replace(config.model, path=path))
        Card(tmp_path, changed, 3, "").write(tmp_path)
        text = (tmp_path / "README.md").read_text()
        head = yaml.safe_load(text.split("---\n")[1])
        assert head["license"] == licence and head.get("base_model") == (None if path == "shapes/lcm" else ["me/model"])
    Card(tmp_path, config, 3, "").write(tmp_path)
    assert "- base model: `shapes/lcm` comes with rlcm_fast" in (tmp_path / "README.md").read_text()


def test_the_curves_of_a_rated_run_are_its_win_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.axes import Axes

    labels: list[str] = []
    monkeypatch.setattr(Axes, "set_ylabel", lambda _, label: labels.append(label))
    config = parse_config(["--config", "shapes/rating", "--policy.kind", "consistency"])
    line = {"reward/human/mean": 0.0, "reward/total/mean": 0.0, "rating/win_rate": 0.75}
    lines = [json.dumps({"iteration": number, **line}) for number in range(6)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    Card(tmp_path, config, 6, "").write(tmp_path)
    assert labels == ["win rate"]
    Card(tmp_path, parse_config(["--config", "shapes/joint"]), 6, "").write(tmp_path)
    assert labels[1:] == ["human", "total", "win rate"]
