"""Models in the layouts of the hub: SDXL, a UNet that goes into a base pipeline, an LCM-LoRA on a base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.loading import LORA_FILE, resolve_lora_path, resolve_model
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig, PolicyConfig
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.trajectory import Prompt

CPU = torch.device("cpu")
TEXTS = ["a red circle", "a star", "a red circle"]
SDXL: Any = StableDiffusionXLPipeline  # its annotations leave None out
SD: Any = StableDiffusionPipeline


@pytest.fixture(scope="module")
def lora_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """For `tiny_sd_folder`."""
    return tiny_pipelines.save_lora(tmp_path_factory.mktemp("lora"), tiny_pipelines.unet())


def load(kind: str = "consistency", dtype: torch.dtype = torch.float32, **model: Any) -> Backbone:
    return Backbone.load(ModelConfig(**model), CPU, dtype, kind)


def policy_of(backbone: Backbone, **config: Any) -> GaussianPolicy:
    unet: Any = backbone.unet
    return build_policy(PolicyConfig(**config), Network(unet, unet.config), backbone.scheduler_config)


def x_0_of(backbone: Backbone, policy: GaussianPolicy) -> Tensor:
    conditioning = backbone.encode([Prompt(text) for text in TEXTS], policy.needs_negative)
    return policy.sample(conditioning, torch.Generator().manual_seed(3))[1]


def x_0_of_stock(pipeline: Any, num_steps: int, guidance_scale: float) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": num_steps, "guidance_scale": guidance_scale, "output_type": "latent"}
    return pipeline(TEXTS, generator=torch.Generator().manual_seed(3), **settings).images


def test_sdxl_texts_are_encoded_as_the_pipeline_does_and_once_each(tiny_sdxl_folder: str):
    backbone = load("ddim", path=tiny_sdxl_folder)
    calls: list[int] = []
    for encoder in backbone.text_encoders:
        encoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    conditioning = backbone.encode([Prompt(text) for text in TEXTS], with_negative=True)
    assert calls == [1] * 6, "two distinct texts and, for the zeros of its negative, the empty one: two encoders each"
    backbone.encode([Prompt(text) for text in TEXTS], with_negative=True)
    assert len(calls) == 6
    stock = SDXL.from_pretrained(tiny_sdxl_folder)
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = stock.encode_prompt(TEXTS, device=CPU)
    assert conditioning.pooled is not None and conditioning.time_ids is not None
    assert conditioning.embeds.shape == (3, 32, tiny_pipelines.WIDTH + tiny_pipelines.WIDTH_2)
    torch.testing.assert_close(conditioning.embeds, embeds)
    torch.testing.assert_close(conditioning.pooled, pooled)
    assert torch.equal(conditioning.negative_embeds, negative[:1])
    assert torch.equal(conditioning.negative_pooled, negative_pooled[:1])
    assert conditioning.time_ids.tolist() == [[16, 16, 0, 0, 16, 16]]
    assert torch.equal(conditioning.take(torch.tensor([2])).pooled, conditioning.pooled[[0]])


def test_an_sdxl_folder_that_encodes_its_empty_prompt_is_followed(tiny_sdxl_folder: str):
    backbone = load("ddim", path=tiny_sdxl_folder)
    backbone._pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    negative = backbone.encode([Prompt("a star")], with_negative=True)
    empty = backbone.encode([Prompt("")], with_negative=False)
    assert torch.equal(negative.negative_embeds, empty.embeds)
    assert torch.equal(negative.negative_pooled, empty.pooled)


def test_only_the_unet_of_sdxl_is_trained_and_its_vae_stays_float32(tiny_sdxl_folder: str):
    backbone = load("ddim", torch.bfloat16, path=tiny_sdxl_folder)
    assert {p.dtype for p in backbone.unet.parameters()} == {torch.bfloat16}
    assert len(backbone.frozen_parts) == 3
    for part in backbone.frozen_parts:
        assert {(p.dtype, p.requires_grad) for p in part.parameters()} == {(torch.float32, False)}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_sdxl_as_a_diffusion_model_draws_what_stock_diffusers_draws(tiny_sdxl_folder: str, guidance_scale: float):
    from diffusers import DDIMScheduler

    backbone = load("ddim", path=tiny_sdxl_folder)
    policy = policy_of(backbone, kind="ddim", num_steps=3, eta=0.5, guidance_scale=guidance_scale)
    stock = SDXL.from_pretrained(tiny_sdxl_folder)
    stock.scheduler = DDIMScheduler.from_config(stock.scheduler.config, clip_sample=False)
    stock.set_progress_bar_config(disable=True)
    expected = stock(
        TEXTS, num_inference_steps=3, guidance_scale=guidance_scale, eta=0.5, output_type="latent",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    torch.testing.assert_close(x_0_of(backbone, policy), expected, atol=1e-4, rtol=1e-5)


def test_a_unet_alone_in_its_base_draws_what_its_model_card_draws(tiny_unet_folder: str, tiny_sdxl_folder: str):
    backbone = load(path=tiny_unet_folder, base=tiny_sdxl_folder)
    unet = UNet2DConditionModel.from_pretrained(tiny_unet_folder)
    stock = SDXL.from_pretrained(tiny_sdxl_folder, unet=unet)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    expected = x_0_of_stock(stock, num_steps=3, guidance_scale=8.0)
    x_0 = x_0_of(backbone, policy_of(backbone, num_steps=3, guidance_scale=8.0))
    torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=1e-5)


def test_an_lcm_lora_is_fused_into_the_weights(tiny_sd_folder: str, lora_folder: str):
    start, fused = load("ddim", path=tiny_sd_folder).unet, load(path=tiny_sd_folder, lora=lora_folder).unet
    adapters = load_file(Path(lora_folder) / LORA_FILE)
    before, after = start.state_dict(), fused.state_dict()
    assert before.keys() == after.keys(), "no adapter is left behind"
    assert all(p.requires_grad for p in fused.parameters())
    assert adapters
    for name, weight in before.items():
        key = f"unet.{name.removesuffix('.weight')}.lora_"
        expected = weight
        if f"{key}A.weight" in adapters:
            expected = weight + 1.5 * adapters.pop(f"{key}B.weight") @ adapters.pop(f"{key}A.weight")
        torch.testing.assert_close(after[name], expected)
    assert not adapters


@pytest.mark.parametrize(
    ("kind", "scheduler", "sampled_as"),
    [
        ("auto", "LCMScheduler", "consistency"),
        ("consistency", "LCMScheduler", "consistency"),
        ("tcd", "TCDScheduler", "tcd"),
        ("euler_ancestral", "EulerDiscreteScheduler", "euler_ancestral"),
        ("ddim", "DDIMScheduler", "ddim"),
    ],
)
def test_a_model_with_a_lora_gets_the_scheduler_of_its_kind(
    tiny_sd_folder: str, lora_folder: str, kind: Any, scheduler: str, sampled_as: str
):
    backbone = load(kind, path=tiny_sd_folder, lora=lora_folder)
    assert backbone.scheduler_config["_class_name"] == scheduler
    policy = policy_of(backbone, kind=kind, guidance_scale=1.0)
    assert policy.schedule.kind == sampled_as
    if kind == "euler_ancestral":
        assert policy.schedule.timesteps.tolist() == [999, 749, 499, 249]
    assert load(kind, path=tiny_sd_folder).scheduler_config["_class_name"] == "DDIMScheduler", "a folder stays as it is"


@pytest.mark.parametrize("guidance_scale", [1.0, 1.5])
def test_an_lcm_lora_on_a_base_model_draws_what_its_model_card_draws(
    tiny_sd_folder: str, lora_folder: str, guidance_scale: float
):
    backbone = load(path=tiny_sd_folder, lora=str(Path(lora_folder) / LORA_FILE))
    stock = SD.from_pretrained(tiny_sd_folder, safety_checker=None)
    stock.scheduler = LCMScheduler.from_config(stock.scheduler.config)
    stock.load_lora_weights(lora_folder)
    expected = x_0_of_stock(stock, 3, guidance_scale)
    x_0 = x_0_of(backbone, policy_of(backbone, num_steps=3, guidance_scale=guidance_scale))
    torch.testing.assert_close(x_0, expected, atol=1e-4, rtol=1e-5)


def test_a_lora_is_added_before_weights_are_rounded_and_leaves_a_diffusion_models_scheduler(
    tiny_sd_folder: str, lora_folder: str
):
    exact = load("ddim", path=tiny_sd_folder, lora=lora_folder)
    rounded = load("ddim", torch.bfloat16, path=tiny_sd_folder, lora=lora_folder)
    assert all(
        torch.equal(value.bfloat16(), rounded.unet.state_dict()[name])
        for name, value in exact.unet.state_dict().items()
    )
    assert "original_inference_steps" not in exact.scheduler_config


def test_a_base_without_its_unet_is_asked_for_and_one_too_many_refused(
    tiny_unet_folder: str, tiny_sdxl_folder: str, tiny_sd_folder: str, tmp_path: Path
):
    with pytest.raises(ValueError, match="holds a network alone .*give the pipeline that it goes into as model.base"):
        resolve_model(ModelConfig(tiny_unet_folder))
    with pytest.raises(ValueError, match="model.base=.* has no use: model.path=.* is a whole pipeline; remove it"):
        resolve_model(ModelConfig(tiny_sdxl_folder, base=tiny_sdxl_folder))
    with pytest.raises(ValueError, match="model.base=no/where/at all does not exist; give"):
        resolve_model(ModelConfig(tiny_unet_folder, base="no/where/at all"))
    with pytest.raises(ValueError, match="holds no UNet to put into model.base: it has no config.json"):
        resolve_model(ModelConfig(str(tmp_path), base=tiny_sdxl_folder))
    with pytest.raises(ValueError, match="model.path=/no/where does not exist; give the folder of a UNet, or a hub id"):
        resolve_model(ModelConfig("/no/where", base=tiny_sdxl_folder))
    with pytest.raises(ValueError, match="for two text encoders of width 40, and model.base=.* has 1 of width 24"):
        load(path=tiny_unet_folder, base=tiny_sd_folder)
    vae = str(Path(tiny_sd_folder) / "vae")
    with pytest.raises(
        ValueError, match="could not be loaded: its vae/config.json belongs to class AutoencoderKL; give"
    ):
        load(path=vae, base=tiny_sd_folder)
    assert resolve_model(ModelConfig("some/unet", base="some/sdxl", lora="some/lora"))[:3] == (
        "some/sdxl",
        "some/unet",
        "some/lora",
    )


def test_a_lora_that_is_none_or_of_another_model_is_refused(
    tiny_sd_folder: str, tiny_sdxl_folder: str, lora_folder: str, tmp_path: Path
):
    with pytest.raises(ValueError, match="model.lora=.* is not the folder of a LoRA: it holds no safetensors file"):
        resolve_lora_path(str(tmp_path))
    for number in (1, 2):
        shutil.copy(Path(lora_folder) / LORA_FILE, tmp_path / f"{number}.safetensors")
    with pytest.raises(ValueError, match="it holds 2 safetensors files and none is pytorch_lora_weights.safetensors"):
        resolve_lora_path(str(tmp_path))
    for wrong in ("/no/where", "missing.safetensors", str(Path(tiny_sd_folder) / "model_index.json")):
        with pytest.raises(ValueError, match="model.lora=.* is not a LoRA; give a folder with"):
            resolve_lora_path(wrong)
    with pytest.raises(ValueError, match="model.lora=.* could not be loaded: .*; give a LoRA that was made for this"):
        load(path=tiny_sdxl_folder, lora=lora_folder)
    with pytest.raises(ValueError, match="model.lora=.* could not be loaded: .*; give a LoRA that was made for this"):
        load(path=tiny_sd_folder, lora=str(Path(tiny_sd_folder) / "vae" / "diffusion_pytorch_model.safetensors"))
