"""A diffusers folder as the parts that training needs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig
from rlcm_fast.trajectory import Prompt

TEXTS = ["a red circle", "a star", "two blue squares and a triangle"]
CPU = torch.device("cpu")


def load(path: str, dtype: torch.dtype = torch.float32, **model: str) -> Backbone:
    return Backbone.load(ModelConfig(path, **model), CPU, dtype, kind="consistency")


@pytest.fixture(scope="module")
def backbone(tiny_lcm_folder: str) -> Backbone:
    return load(tiny_lcm_folder)


@pytest.fixture
def encoded_rows(backbone: Backbone) -> Iterator[list[int]]:
    """How many texts each call of the text encoder had; starts with an empty cache."""
    rows: list[int] = []
    backbone._encodings.clear()
    hook = backbone._pipeline.text_encoder.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    yield rows
    hook.remove()


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def test_encodings_are_the_pipelines_own(backbone: Backbone):
    conditioning = backbone.encode(prompts(*TEXTS, *TEXTS), with_negative=True)
    for text, embeds in zip([*TEXTS, *TEXTS], conditioning.embeds, strict=True):
        expected, _ = backbone._pipeline.encode_prompt(text, CPU, 1, False)
        torch.testing.assert_close(embeds, expected[0])
    assert conditioning.negative_embeds is not None
    empty, _ = backbone._pipeline.encode_prompt("", CPU, 1, False)
    torch.testing.assert_close(conditioning.negative_embeds, empty)


def test_each_distinct_text_is_encoded_once_in_the_life_of_the_run(backbone: Backbone, encoded_rows: list[int]):
    first = backbone.encode(prompts(TEXTS[0], TEXTS[1], TEXTS[0], TEXTS[0]), with_negative=False)
    assert sum(encoded_rows) == 2
    assert first.prompt_embeds.shape[0] == 2
    assert first.index.tolist() == [0, 1, 0, 0]
    assert first.negative_embeds is None
    backbone.encode(prompts(TEXTS[1], TEXTS[2]), with_negative=False)
    assert sum(encoded_rows) == 3


def test_an_encoding_does_not_depend_on_what_is_encoded_with_it(backbone: Backbone, encoded_rows: list[int]):
    # A resumed run meets texts in another company than the uninterrupted one did, and has to be bitwise the same.
    together = backbone.encode(prompts(*TEXTS), with_negative=False).embeds
    for text, embeds in zip(TEXTS, together, strict=True):
        backbone._encodings.clear()
        assert torch.equal(backbone.encode(prompts(text), with_negative=False).embeds[0], embeds)
    assert encoded_rows == [1] * (len(TEXTS) + len(TEXTS))


def test_decoded_images_are_the_pipelines(backbone: Backbone):
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    images = backbone.decode(latents)
    vae = backbone._pipeline.vae
    with torch.no_grad():
        raw = vae.decode(latents / vae.config.scaling_factor).sample
    expected: Tensor = backbone._pipeline.image_processor.postprocess(raw, output_type="pt")
    assert images.shape == (2, 3, 16, 16) and images.dtype == torch.float32
    torch.testing.assert_close(images, expected)


def test_only_the_unet_is_trained_and_only_it_has_the_training_dtype(tiny_sd_folder: str):
    backbone = load(tiny_sd_folder, torch.bfloat16)
    assert {p.dtype for p in backbone.unet.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in backbone.unet.parameters())
    assert not backbone.unet.training
    for part in (backbone._pipeline.vae, backbone._pipeline.text_encoder):
        assert {p.dtype for p in part.parameters()} == {torch.float32}
        assert not any(p.requires_grad for p in part.parameters())


def test_an_export_holds_the_given_weights_and_loads_again(backbone: Backbone, tmp_path: Path):
    weights = {name: value + 1 for name, value in backbone.unet.state_dict().items()}
    backbone.export(weights, tmp_path)
    other = load(str(tmp_path))
    assert all(torch.equal(value, weights[name]) for name, value in other.unet.state_dict().items())
    assert dict(other.scheduler_config) == dict(backbone.scheduler_config)
    assert not torch.equal(next(iter(backbone.unet.parameters())), next(iter(other.unet.parameters())))


def test_a_pipeline_without_a_text_conditioned_unet_is_refused(tmp_path: Path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no UNet2DConditionModel; give a Stable Diffusion or LCM folder"):
        load(str(tmp_path))


def test_a_folder_with_missing_files_is_named(tmp_path: Path, tiny_lcm_folder: str):
    import shutil

    shutil.copytree(tiny_lcm_folder, tmp_path / "broken")
    shutil.rmtree(tmp_path / "broken" / "unet")
    with pytest.raises(ValueError, match="model.path=.*broken could not be loaded"):
        load(str(tmp_path / "broken"))


def test_an_image_size_of_ones_own_is_that_of_samples_and_of_the_export(tiny_lcm_folder: str, tmp_path: Path):
    model = ModelConfig(tiny_lcm_folder, image_size=24)
    sized = Backbone.load(model, CPU, torch.float32, kind="consistency")
    assert sized.unet.config.sample_size == 12  # pyright: ignore[reportAttributeAccessIssue]
    sized.export({name: value.float() for name, value in sized.unet.state_dict().items()}, tmp_path / "export")
    again = Backbone.load(ModelConfig(str(tmp_path / "export")), CPU, torch.float32, kind="consistency")
    assert again.unet.config.sample_size == 12  # pyright: ignore[reportAttributeAccessIssue]


def test_an_image_size_that_the_unet_cannot_halve_is_refused(tiny_lcm_folder: str):
    with pytest.raises(ValueError, match="model.image_size=18 must divide by 4; try 16"):
        Backbone.load(ModelConfig(tiny_lcm_folder, image_size=18), CPU, torch.float32, kind="consistency")
