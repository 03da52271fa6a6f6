"""A text-to-image pipeline with random weights, small enough for every test and built without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LETTERS = [letter + ending for ending in ("", "</w>") for letter in "abcdefghijklmnopqrstuvwxyz"]
SPECIAL = ["<|startoftext|>", "<|endoftext|>"]


def make_unet(time_cond_proj_dim: int | None) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        time_cond_proj_dim=time_cond_proj_dim,
    ).eval()


@pytest.fixture(scope="session")
def build_unet() -> Callable[[int | None], UNet2DConditionModel]:
    return make_unet


@pytest.fixture(scope="session")
def pipeline_parts() -> dict[str, Any]:
    """What StableDiffusionPipeline and LatentConsistencyModelPipeline take besides unet and scheduler."""
    torch.manual_seed(1)
    build_vae: Any = AutoencoderKL  # its annotations are of one-element tuples
    vae = build_vae(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    ).eval()
    vocabulary = {token: i for i, token in enumerate(LETTERS + SPECIAL)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    config = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=vocabulary[SPECIAL[0]],
        eos_token_id=vocabulary[SPECIAL[1]],
        pad_token_id=vocabulary[SPECIAL[1]],
    )
    text_encoder = CLIPTextModel(config).eval()
    return {
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }
