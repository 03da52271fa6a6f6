"""The autoencoder: 64 x 64 RGB <-> 8 x 8 x 8 latents, 0.4 M parameters, diffusers' AutoencoderTiny.

Why this form, on two CPU cores: without normalisation layers a colour's level passes straight through, and being fully
convolutional it learns from 32 x 32 crops, of which we take those that show a shape. AutoencoderKL with thin layers and
an L1 loss on full images still drew grey blobs after 12 minutes (which of the three changes did most was not tried).

Stage 1 trains both halves on crops: squared error, coloured pixels weighing up to three times as much (most pixels are
background; with L1 the median, an empty image, is where training stays). Stage 2 tunes the decoder alone, on whole
images and lightly noised latents: L1 on pixels and on edges, so sharper, and forgiving to what a UNet draws. The
latents do not change in it, so the teacher may train meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from rlcm_fast.shapes.pretrain.dataset import to_model_range
from rlcm_fast.shapes.pretrain.stage import StageConfig, run_stage

JOINT = StageConfig(num_steps=4000, batch_size=16, lr=2e-3, weight_decay=0.0)
DECODER = StageConfig(num_steps=2000, batch_size=8, lr=1e-3, weight_decay=0.0)
LATENT_CHANNELS = 8
_CROP = 32
_LATENT_NOISE = 0.02  # stage 1, absolute: keeps neighbouring latents meaning neighbouring images
_DECODER_NOISE = 0.06  # stage 2, of the latents' standard deviation


def new_vae(seed: int) -> AutoencoderTiny:
    """Full resolution is touched by single convolutions only, since it costs most of a decode on a CPU."""
    torch.manual_seed(seed)
    vae = AutoencoderTiny(
        latent_channels=LATENT_CHANNELS,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        num_encoder_blocks=(0, 1, 2, 2),
        num_decoder_blocks=(2, 2, 2, 0),
    )
    return vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def train_joint(images: Tensor, folder: Path, seed: int, config: StageConfig = JOINT) -> AutoencoderTiny:
    """Trains encoder and decoder on uint8 `images` and sets `scaling_factor` to 1 / std of the latents."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def loss(vae: Any, _: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        pixels = to_model_range(_crops(images, indices, generator)).to(device)
        latents = vae.encoder(pixels)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        error = vae.decoder(latents + _LATENT_NOISE * noise) - pixels
        saturation = pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)  # (B, 1, h, w) in [0, 2]
        return ((1 + 2 * saturation) * error.square()).mean()

    fresh: Any = new_vae(seed)
    vae = run_stage("vae_joint", fresh.to(device), loss, len(images), config, folder, seed)
    assert isinstance(vae, AutoencoderTiny)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, images[:2048]).std().item(), 4))
    return vae


def train_decoder(
    vae: AutoencoderTiny, images: Tensor, folder: Path, seed: int, config: StageConfig = DECODER
) -> AutoencoderTiny:
    """Tunes the decoder with the encoder, and so the latents, left as they are."""
    device = next(vae.parameters()).device
    vae.decoder.requires_grad_(True)
    noise_scale = _DECODER_NOISE / vae.config["scaling_factor"]

    def loss(model: Any, _: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        pixels = to_model_range(images[indices]).to(device)
        with torch.no_grad():
            latents = model.encoder(pixels)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        error = model.decoder(latents + noise_scale * noise) - pixels
        return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()

    trained = run_stage("vae_decoder", vae, loss, len(images), config, folder, seed + 1)
    assert isinstance(trained, AutoencoderTiny)
    return trained


def _crops(images: Tensor, indices: Tensor, generator: torch.Generator) -> Tensor:
    """A crop of each image, of two random ones the one that shows more of a shape: (B, 3, 32, 32) uint8."""
    limit = images.shape[-1] - _CROP + 1
    offsets = torch.randint(limit, (len(indices), 2, 2), generator=generator).tolist()
    chosen = []
    for image, pair in zip(images[indices], offsets, strict=True):
        crops = [image[:, y : y + _CROP, x : x + _CROP] for y, x in pair]
        chosen.append(max(crops, key=lambda crop: int((crop.amax(0) - crop.amin(0) > 70).sum())))
    return torch.stack(chosen)


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: Tensor, batch_size: int = 256) -> Tensor:
    """Unscaled latents (N, 8, 8, 8) of uint8 images."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encoder(to_model_range(batch).to(device)).cpu() for batch in images.split(batch_size)])
