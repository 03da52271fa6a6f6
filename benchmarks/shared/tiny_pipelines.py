"""Random pipelines in the layouts of the hub, small enough for every test and made without a download.

Images are 16 x 16, latents 8 x 8 x 4, a UNet has about 30,000 weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

SPECIAL = ("<|startoftext|>", "<|endoftext|>")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH, WIDTH_2, POOLED = 24, 16, 12  # of the first text encoder, of the second, of its projection


def save_lcm(folder: Path) -> str:
    """Saves a LatentConsistencyModelPipeline like SimianLuo/LCM_Dreamshaper_v7: its UNet has a guidance input."""
    parts = {**_parts(), "unet": unet(time_cond_proj_dim=16), "scheduler": LCMScheduler(**BETAS)}
    LatentConsistencyModelPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def save_sd(folder: Path, scheduler: Any = None) -> str:
    """Saves a StableDiffusionPipeline with a scheduler, or with DDIM's."""
    ddim = DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1)
    parts = {**_parts(), "unet": unet(), "scheduler": scheduler or ddim}
    StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return str(folder)


def save_sdxl(folder: Path, pooled: int = POOLED, scheduler: Any = None) -> str:
    """Saves a pipeline like stabilityai/stable-diffusion-xl-base-1.0: two text encoders, time ids, Euler.

    scheduler: replaces Euler.
    """
    parts = _parts()
    del parts["safety_checker"]
    torch.manual_seed(2)
    config = _text_config(parts["tokenizer"], WIDTH_2, projection_dim=pooled)
    StableDiffusionXLPipeline(
        **parts,
        unet=unet(is_sdxl=True, pooled=pooled),
        scheduler=scheduler or EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading"),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=parts["tokenizer"],
        add_watermarker=False,
    ).save_pretrained(folder)
    return str(folder)


def save_unet_alone(folder: Path) -> str:
    """Saves config and weights of a UNet with a guidance input, and nothing else, like latent-consistency/lcm-sdxl."""
    unet(time_cond_proj_dim=16, is_sdxl=True, seed=5).save_pretrained(folder)
    return str(folder)


def save_lora(folder: Path, of: UNet2DConditionModel, pipeline_class: Any = StableDiffusionPipeline) -> str:
    """Saves random adapters on a UNet's attention, rank 2, scaled by 1.5, like latent-consistency/lcm-lora-sdv1-5."""
    of.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(7)
    for name, weight in of.named_parameters():
        if "lora_" in name:
            weight.data.normal_(std=0.3, generator=generator)
    metadata = of.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(of)
    pipeline_class.save_lora_weights(folder, unet_lora_layers=layers, unet_lora_adapter_metadata=metadata)
    return str(folder)


def unet(
    time_cond_proj_dim: int | None = None, is_sdxl: bool = False, seed: int = 0, pooled: int = POOLED
) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    more: dict[str, Any] = {}
    if is_sdxl:
        more = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
        more["projection_class_embeddings_input_dim"] = 6 * 8 + pooled
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=WIDTH + WIDTH_2 * is_sdxl,
        attention_head_dim=2,
        time_cond_proj_dim=time_cond_proj_dim,
        **more,
    )


def _parts() -> dict[str, Any]:
    """What every pipeline takes besides UNet and scheduler; the tokenizer spells words out letter by letter."""
    # A decoder of 16 x 16 pixels.
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
    )

    # A tokenizer that knows letters, alone and at the end of a word.
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789")
    last_letters = [f"{letter}</w>" for letter in letters]
    vocabulary = {token: i for i, token in enumerate([*letters, *last_letters, *SPECIAL])}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    return {
        "vae": vae,
        "text_encoder": CLIPTextModel(_text_config(tokenizer, WIDTH)),
        "tokenizer": tokenizer,
        "safety_checker": None,
        "feature_extractor": None,
    }


def _text_config(tokenizer: Any, width: int, **more: int) -> CLIPTextConfig:
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in SPECIAL)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=begin,
        eos_token_id=end,
        pad_token_id=end,
        **more,
    )
