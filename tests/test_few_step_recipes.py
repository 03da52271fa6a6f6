"""Recipes for Turbo, DMD2, Hyper-SD, Lightning and LCM-LoRA: checked, planned, and run on small models of their layout.

What a run exports draws what the policy draws: the stock pipeline of the export, with the scheduler that lies in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import (
    DiffusionPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from benchmarks.shared import tiny_pipelines
from rlcm_fast.config import parse_config
from rlcm_fast.config.batches import with_numbers
from rlcm_fast.config.resolved import resolve
from rlcm_fast.planner.of_config import planner_of
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

TRAILING: dict[str, Any] = {**tiny_pipelines.BETAS, "timestep_spacing": "trailing"}


def save_sd_turbo(folder: Path) -> dict[str, str]:
    path = tiny_pipelines.save_sd(folder / "model", EulerDiscreteScheduler(**TRAILING, steps_offset=1))
    # The hub's copy has this key, which Euler ignores.
    file = Path(path) / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "set_alpha_to_one": False}))
    return {"model.path": path}


def save_sdxl_turbo(folder: Path) -> dict[str, str]:
    scheduler = EulerAncestralDiscreteScheduler(**TRAILING)
    return {"model.path": tiny_pipelines.save_sdxl(folder / "model", scheduler=scheduler)}


def save_sd_with_lora(folder: Path) -> dict[str, str]:
    path = tiny_pipelines.save_sd(folder / "model")
    lora = tiny_pipelines.save_lora(folder / "lora", tiny_pipelines.unet(), StableDiffusionPipeline)
    return {"model.path": path, "model.lora": lora}


def save_sdxl_with_lora(folder: Path) -> dict[str, str]:
    path = tiny_pipelines.save_sdxl(folder / "model")
    unet = tiny_pipelines.unet(is_sdxl=True)
    lora = tiny_pipelines.save_lora(folder / "lora", unet, StableDiffusionXLPipeline)
    return {"model.path": path, "model.lora": lora}


# The layout of each recipe's model; what it samples with; what its stock pipeline is called with beside the steps.
Save = Callable[[Path], dict[str, str]]
RECIPES: dict[str, tuple[Save, str, dict[str, Any]]] = {
    "turbo/sd_turbo": (save_sd_turbo, "euler_ancestral, timesteps 999", {}),
    "turbo/sdxl_turbo": (save_sdxl_turbo, "euler_ancestral, timesteps 999 749 499 249", {}),
    "dmd2/sdxl": (
        save_sdxl_with_lora, "consistency, timesteps 999 749 499 249", {"timesteps": [999, 749, 499, 249]}
    ),
    "hyper_sd/sd15": (save_sd_with_lora, "tcd, timesteps 999 759 499 259", {"eta": 0.3}),
    "hyper_sd/sdxl": (save_sdxl_with_lora, "tcd, timesteps 999 759 499 259", {"eta": 0.3}),
    "lightning/sdxl": (save_sdxl_with_lora, "euler_ancestral, timesteps 999 749 499 249", {}),
    "lcm_lora/sd15": (save_sd_with_lora, "consistency, timesteps 999 759 499 259", {}),
    "lcm_lora/sdxl": (save_sdxl_with_lora, "consistency, timesteps 999 759 499 259", {}),
}  # fmt: skip
TELLING = ("turbo/sd_turbo", "hyper_sd/sdxl")


SDXL = [*(name for name in RECIPES if "sdxl" in name), "sdxl_lcm/full_16gb", "sdxl_lcm/full_24gb"]


@pytest.mark.parametrize("name", SDXL)
def test_a_config_of_sdxl_has_the_vae_that_float16_suits_and_may_have_the_models_own(name: str):
    ours, own = parse_config(["--config", name]), parse_config(["--config", name, "--model.vae", "null"])
    assert (ours.model.vae, own.model.vae) == ("madebyollin/sdxl-vae-fp16-fix", None)
    assert ours.model.vae_dtype == "auto"
    planner, strategy = planner_of(resolve(with_numbers(ours, 1), 1))
    theirs, _ = planner_of(resolve(with_numbers(own, 1), 1))
    assert planner.tries_half(strategy) and not theirs.tries_half(strategy)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_its_licence_and_runs_one_row_per_sample(recipe: str):
    head = [line for line in Path(f"configs/{recipe}.yaml").read_text().splitlines() if line.startswith("#")]
    assert any("Licence: " in line for line in head)
    assert parse_config(["--config", recipe]).policy.guidance_scale == 1


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [pytest.param(n, marks=[pytest.mark.telling] * (n in TELLING)) for n in RECIPES])
@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_recipe_runs_with_a_small_model_of_its_layout_and_the_export_draws_alike(recipe: str, tmp_path: Path):
    # Everything is the recipe's but what needs a hub, a GPU, a compiler or much time.
    save, sampler, arguments = RECIPES[recipe]
    small = {
        **save(tmp_path), "run_dir": tmp_path / "run", "num_iterations": 2, "tracking.tensorboard": False,
        "model.image_size": 0, "prompts.num_prompts": 2, "update.num_updates": 2, "update.clip_range": 0.01,
        "model.vae": "null", "engine.compile": "off", "engine.dtype": "fp32", "optimizer.name": "adamw",
    }  # fmt: skip
    trainer = Trainer(parse_config(["--config", recipe, *(f"--{name}={value}" for name, value in small.items())]))
    before = trainer.engine.full_weights()
    policy = trainer.images.policy
    assert str(policy.schedule) == sampler
    trainer.run()

    # Both iterations learn something, from a ratio of one.
    lines = [line for line in tiny_runs.metrics(tmp_path / "run") if "loss" in line]
    assert [line["iteration"] for line in lines] == [0, 1]
    for line in lines:
        assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
        assert line["grad_norm"] > 0 and line["advantage/abs_mean"] > 0
    assert lines[0]["ratio/noise_floor"] < 1e-5
    after = trainer.engine.full_weights()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > len(before) / 2

    # The export draws the same image, but Lightning's, whose own sampler has no noise.
    if recipe == "lightning/sdxl":
        return
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "run" / "export")
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        "a red circle", guidance_scale=1.0, generator=torch.Generator().manual_seed(5), output_type="latent",
        **{"num_inference_steps": policy.num_steps, **arguments},
    ).images  # fmt: skip
    conditioning = trainer.images.encode([Prompt("a red circle")])
    _, x_0 = policy.sample(conditioning, torch.Generator().manual_seed(5), explores=False)
    torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=1e-5)
