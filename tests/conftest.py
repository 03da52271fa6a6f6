"""Folders of random pipelines, small enough for every test and made without a download."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import settings

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined: they run in Triton's interpreter

# No deadlines: the first example pays for what is set up once, and machines that run tests are busy.
settings.register_profile("rlcm_fast", deadline=None, derandomize=True)
settings.load_profile("rlcm_fast")

SPECIAL = ("<|startoftext|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone; what it says in the environment is gone after the module."""
    from rlcm_fast.memory.processes import init_processes
    from rlcm_fast.train import set_process_environment

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that it is undone
            patch.delenv(name)
        set_process_environment()
        init_processes()
        yield


@pytest.fixture(scope="session")
def tiny_lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LatentConsistencyModelPipeline of 16 x 16 images, 8 x 8 x 4 latents and about 30,000 weights."""
    from diffusers import LatentConsistencyModelPipeline, LCMScheduler

    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    folder = tmp_path_factory.mktemp("tiny_lcm")
    parts = _parts_around(_unet(time_cond_proj_dim=16))
    LatentConsistencyModelPipeline(scheduler=scheduler, **parts).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusionPipeline of the same sizes, with DDIM's scheduler."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    folder = tmp_path_factory.mktemp("tiny_sd")
    StableDiffusionPipeline(scheduler=scheduler, **_parts_around(_unet(time_cond_proj_dim=None))).save_pretrained(
        folder
    )
    return str(Path(folder))


def _unet(time_cond_proj_dim: int | None) -> UNet2DConditionModel:
    import torch
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
        time_cond_proj_dim=time_cond_proj_dim,
    )


def _parts_around(unet: UNet2DConditionModel) -> dict[str, Any]:
    """What a pipeline takes besides its scheduler; the tokenizer spells words out letter by letter."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )
    letters = [letter + ending for ending in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {token: i for i, token in enumerate([*letters, *SPECIAL])}
    begin, end = (vocabulary[token] for token in SPECIAL)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
    )
    return {
        "unet": unet,
        "vae": vae,
        "text_encoder": CLIPTextModel(config),
        "tokenizer": CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
