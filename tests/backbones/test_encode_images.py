"""Images to latents and back; captions that are not remembered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig
from rlcm_fast.trajectory import Prompt

CPU = torch.device("cpu")
ROUND_TRIP = 0.02  # mean absolute error


def load(folder: str, device: torch.device = CPU, size: int = 0, offload: bool = False) -> Backbone:
    return Backbone.load(ModelConfig(folder), device, torch.float32, True, offload, size)


def images(num_images: int, side: int = 16) -> Tensor:
    return torch.rand(num_images, 3, side, side, generator=torch.Generator().manual_seed(0))


def test_a_render_comes_back_from_the_shipped_model():
    from rlcm_fast.pairs import PairStream

    backbone = load("shapes/lcm")
    renders, _ = PairStream("shapes:all", 64, 16, seed=0).next_batch()
    x_0 = backbone.encode_images(renders)
    assert x_0.shape == (16, 8, 8, 8)
    assert x_0.dtype == torch.float32
    assert 0.9 < x_0.std() < 1.1  # scaled as the UNet wants them
    assert (backbone.decode(x_0) - renders).abs().mean() < ROUND_TRIP


def test_latents_are_scaled_samples_of_the_posterior(tiny_lcm_folder: str):
    backbone = load(tiny_lcm_folder)
    vae = backbone._pipeline.vae
    with torch.no_grad():
        posterior = vae.encode(images(3) * 2 - 1).latent_dist
    x_0 = backbone.encode_images(images(3), torch.Generator().manual_seed(1))
    expected = posterior.sample(torch.Generator().manual_seed(1)) * vae.config.scaling_factor
    torch.testing.assert_close(x_0, expected)
    assert torch.equal(backbone.encode_images(images(3), torch.Generator().manual_seed(1)), x_0)


def test_latents_have_the_mean_and_deviation_that_an_sdxl_folder_names(tiny_sdxl_folder: str, tmp_path: Path):
    folder = Path(shutil.copytree(tiny_sdxl_folder, tmp_path / "model"))
    config = folder / "vae" / "config.json"
    statistics = {"latents_mean": [0.3, -0.2, 0.1, 0.0], "latents_std": [1.5, 0.7, 1.0, 2.0], "scaling_factor": 0.5}
    config.write_text(json.dumps(json.loads(config.read_text()) | statistics))
    stock: Any = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        expected = stock.prepare_latents(
            images(3) * 2 - 1, None, 3, 1, torch.float32, CPU, generator, add_noise=False
        )  # without noise these are x_0
    backbone = load(str(folder))
    torch.testing.assert_close(backbone.encode_images(images(3), torch.Generator().manual_seed(1)), expected)


@pytest.mark.parametrize("size, slices", [(0, [5]), (2, [2, 2, 1])])
def test_images_are_encoded_in_slices_of_decode_batch_size(tiny_lcm_folder: str, size: int, slices: list[int]):
    backbone, seen = load(tiny_lcm_folder, size=size), []
    backbone._pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    assert backbone.encode_images(images(5)).shape == (5, 4, 8, 8)
    assert seen == slices


@pytest.mark.parametrize("kind", ["lcm", "sdxl"])
def test_captions_are_encoded_together_and_forgotten(kind: str, request: pytest.FixtureRequest):
    model = ModelConfig(request.getfixturevalue(f"tiny_{kind}_folder"))
    backbone, rows = Backbone.load(model, CPU, torch.float32, kind="consistency" if kind == "lcm" else "ddim"), []
    backbone.text_encoders[0].register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    prompts = [Prompt("a red circle"), Prompt("a star"), Prompt("a red circle")]
    forgotten = backbone.encode(prompts, with_negative=False, remember=False)
    assert rows == [2]
    assert backbone._encodings == {}
    remembered = backbone.encode(prompts, with_negative=False)
    torch.testing.assert_close(forgotten.embeds, remembered.embeds)
    torch.testing.assert_close(forgotten.pooled, remembered.pooled)
