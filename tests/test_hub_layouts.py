"""Whole runs on models in the layouts of the hub; what they export is stock diffusers' again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

from benchmarks.shared import tiny_pipelines
from rlcm_fast.config import parse_config
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")


def run(model: str, run_dir: Path, **settings: object) -> Trainer:
    """One iteration; settings with __ for the dots."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    trainer = Trainer(parse_config(tiny_runs.arguments(model, run_dir, {"num_iterations": 1, **changes})))
    before = trainer.engine.full_weights()
    trainer.run()
    (line,) = tiny_runs.metrics(run_dir)
    assert line["ratio/noise_floor"] < 1e-5
    assert line["grad_norm"] > 0
    after = trainer.engine.full_weights()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2
    return trainer


def assert_draws_the_same(trainer: Trainer, stock: Any, **more: float) -> None:
    config = trainer.config.policy
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a red circle",
        num_inference_steps=config.num_steps,
        guidance_scale=config.guidance_scale,
        generator=torch.Generator().manual_seed(5),
        output_type="latent",
        **more,
    ).images
    conditioning = trainer.images.encode([Prompt("a red circle")])
    _, x_0 = trainer.images.policy.sample(conditioning, torch.Generator().manual_seed(5))
    torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=1e-5)


def test_a_unet_alone_is_trained_in_its_base(tiny_unet_folder: str, tiny_sdxl_folder: str, tmp_path: Path):
    trainer = run(tiny_unet_folder, tmp_path / "run", model__base=tiny_sdxl_folder, policy__guidance_scale=8.0)
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "export")
    assert_draws_the_same(trainer, stock)
    again = run(str(tmp_path / "run" / "export"), tmp_path / "again", update__kl_weight=0.1)  # now a whole pipeline
    assert again.images.backbone.scheduler_config["original_inference_steps"] == 50


def test_sdxl_is_trained_as_a_diffusion_model(tiny_sdxl_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saving = {"rollout__decode_batch_size": 1, "engine__offload_idle": True}
    decoded: list[int] = []
    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda vae, z, **k: (decoded.append(len(z)), decode(vae, z, **k))[1])
    trainer = run(tiny_sdxl_folder, tmp_path / "run", policy__kind="ddim", policy__guidance_scale=3.0, **saving)
    assert decoded == [1] * 4
    stock = StableDiffusionXLPipeline.from_pretrained(tmp_path / "run" / "export")
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    assert_draws_the_same(trainer, stock, eta=1.0)


def test_a_base_model_is_trained_with_an_lcm_lora_in_its_weights(tiny_sd_folder: str, tmp_path: Path):
    lora = tiny_pipelines.save_lora(tmp_path / "lora", tiny_pipelines.unet())
    trainer = run(tiny_sd_folder, tmp_path / "run", model__lora=lora, policy__guidance_scale=1.5)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "run" / "export", safety_checker=None)
    assert_draws_the_same(trainer, stock)
