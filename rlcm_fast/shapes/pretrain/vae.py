"""Trains the autoencoder, 64 x 64 RGB <-> 8 x 8 x 8 latents, 0.4 M parameters, diffusers' AutoencoderTiny.

We chose this form for two CPU cores. Without normalisation layers, the level of a colour passes straight through. A
fully convolutional network learns from 32 x 32 crops, of which we use those that show a shape. AutoencoderKL with thin
layers and an L1 loss on full images still drew grey blobs after 12 minutes. We did not try which of the three changes
helped most.

Stage 1 trains both halves on crops with squared error, and coloured pixels weigh about four times as much. Most pixels
are background, so training with L1 would stay at the median, an empty image. Stage 2 tunes only the decoder, on windows
of lightly noised latents, with both errors and L1 on edges. This makes it sharper, and tolerant of what a UNet draws.
Stage 2 does not change the latents, so the teacher can train meanwhile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from torch import Tensor, nn

from rlcm_fast.shapes.pretrain.dataset import to_model_range
from rlcm_fast.shapes.pretrain.stage import StageConfig, StageRun, run_stage

JOINT = StageConfig(num_steps=4000, batch_size=16, lr=2e-3, weight_decay=0.0)
DECODER = StageConfig(num_steps=8000, batch_size=16, lr=1.5e-3, weight_decay=0.0)
LATENT_CHANNELS = 8
_STRIDE = 8  # pixels per latent
_CROP = 32  # pixels, in stage 1
_WINDOW = 40  # pixels, in stage 2
_CUT = 6  # pixels at the edge of a window, where the decoder misses their neighbours
_LATENT_NOISE = 0.02  # stage 1, absolute: makes neighbouring latents mean neighbouring images
_DECODER_NOISE = 0.06  # stage 2, relative to the standard deviation of the latents


def new_vae(seed: int) -> AutoencoderTiny:
    """A new autoencoder; only single convolutions run at full resolution, which costs most of a decode on a CPU."""
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
    """Train encoder and decoder on uint8 `images`, and set `scaling_factor` to 1 / std of the latents."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def loss(vae: Any, _: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        whole = images[indices]
        pixels = to_model_range(_cut(whole, _coloured_corners(whole, _CROP, 1, generator), _CROP)).to(device)
        latents = vae.encoder(pixels)
        noise = torch.randn(latents.shape, generator=generator).to(device)
        error = vae.decoder(latents + _LATENT_NOISE * noise) - pixels
        return (_weights(pixels) * error.square()).mean()

    fresh: Any = new_vae(seed)
    vae = run_stage(fresh.to(device), loss, len(images), config, StageRun("vae_joint", folder, seed))
    assert isinstance(vae, AutoencoderTiny)
    vae.register_to_config(scaling_factor=round(1 / encode(vae, images[:2048]).std().item(), 4))
    return vae


def train_decoder(
    vae: AutoencoderTiny, images: Tensor, folder: Path, seed: int, config: StageConfig = DECODER
) -> AutoencoderTiny:
    """Tune the decoder, and leave the encoder and so the latents as they are."""
    device = next(vae.parameters()).device
    vae.decoder.requires_grad_(True)
    noise_scale = _DECODER_NOISE / vae.config["scaling_factor"]

    # The loss of a batch.
    def loss(model: Any, _: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        # Encode the images and cut out windows with noise on their latents.
        whole = images[indices]
        with torch.no_grad():
            latents = model.encoder(to_model_range(whole).to(device))
        noise = torch.randn(latents.shape, generator=generator).to(device)
        corners = _coloured_corners(whole, _WINDOW, _STRIDE, generator)
        pixels = to_model_range(_cut(whole, corners, _WINDOW)).to(device)
        inputs = _cut(latents + noise_scale * noise, corners, _WINDOW // _STRIDE, _STRIDE)

        # Compare pixels and edges, except where a window was cut.
        error = (model.decoder(inputs) - pixels) * _inside(corners, whole.shape[-1]).to(device)
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return (_weights(pixels) * (error.abs() + error.square())).mean() + edges

    trained = run_stage(vae, loss, len(images), config, StageRun("vae_decoder", folder, seed + 1))
    assert isinstance(trained, AutoencoderTiny)
    return trained


def _coloured_corners(images: Tensor, size: int, step: int, generator: torch.Generator) -> list[tuple[int, int]]:
    """The corner (y, x), in multiples of `step`, of a square of `size` pixels in each image.

    Of two random squares it is the one that shows more shape.
    """
    limit = (images.shape[-1] - size) // step + 1
    corners = (torch.randint(limit, (len(images), 2, 2), generator=generator) * step).tolist()

    def coloured(image: Tensor, y: int, x: int) -> int:
        square = image[:, y : y + size, x : x + size]
        return int((square.amax(0) - square.amin(0) > 70).sum())

    return [
        max(map(tuple, pair), key=lambda c: coloured(image, *c)) for image, pair in zip(images, corners, strict=True)
    ]


def _cut(images: Tensor, corners: list[tuple[int, int]], size: int, stride: int = 1) -> Tensor:
    """The squares (B, C, size, size) of `images`; `stride` units of the corners are one pixel of `images`."""
    pairs = zip(images, corners, strict=True)
    return torch.stack([i[:, y // stride :, x // stride :][:, :size, :size] for i, (y, x) in pairs])


def _inside(corners: list[tuple[int, int]], image_size: int) -> Tensor:
    """A mask (B, 1, `_WINDOW`, `_WINDOW`): 0 within `_CUT` pixels of a cut, else 1; the edge of an image is no cut."""
    mask = torch.zeros(len(corners), 1, _WINDOW, _WINDOW)
    last = image_size - _WINDOW
    for row, (y, x) in zip(mask, corners, strict=True):
        top, left = (_CUT if start > 0 else 0 for start in (y, x))
        bottom, right = (_WINDOW - (_CUT if start < last else 0) for start in (y, x))
        row[:, top:bottom, left:right] = 1
    return mask


def _weights(pixels: Tensor) -> Tensor:
    """The weights (B, 1, h, w) of pixels in [-1, 1], from 1 for grey pixels to 5 for the most saturated."""
    return 1 + 2 * (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True))


@torch.no_grad()
def encode(vae: AutoencoderTiny, images: Tensor, batch_size: int = 256) -> Tensor:
    """The unscaled latents (N, 8, 8, 8) of uint8 images."""
    device = next(vae.parameters()).device
    return torch.cat([vae.encoder(to_model_range(batch).to(device)).cpu() for batch in images.split(batch_size)])
