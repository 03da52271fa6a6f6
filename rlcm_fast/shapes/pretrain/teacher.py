"""Trains the diffusion teacher: a UNet and a text encoder that predict the noise of captioned latents.

The UNet predicts epsilon on the scaled-linear schedule of Stable Diffusion (0.00085 to 0.012, 1000 steps). Training
drops 10 % of the captions for classifier-free guidance (Ho & Salimans, arXiv 2207.12598). Min-SNR weights (arXiv
2303.09556, eq. 5, gamma 5) shift the effort to the noisy steps, which decide the layout of a scene. A second, shorter
cosine with a lower learning rate follows: after one cosine, the arms of stars were still too rough for the detector.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import CLIPTextModel

from rlcm_fast.shapes.pretrain.dataset import CaptionedLatents
from rlcm_fast.shapes.pretrain.stage import StageConfig, StageRun, run_cycles
from rlcm_fast.shapes.pretrain.text import EMBEDDING_SIZE, new_text_encoder, new_tokenizer, tokenize

FIRST_CYCLE = StageConfig(num_steps=6000, batch_size=64, lr=8e-4, ema_decay=0.998)
SECOND_CYCLE = StageConfig(num_steps=3000, batch_size=64, lr=5e-4, ema_decay=0.998)
_CAPTION_DROPOUT = 0.1
_SNR_GAMMA = 5.0


def noise_schedule() -> DDPMScheduler:
    """The noise schedule, with the betas of Stable Diffusion."""
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="epsilon",
        clip_sample=False,
        steps_offset=1,
    )


def new_unet(time_cond_proj_dim: int | None = None) -> UNet2DConditionModel:
    """A new UNet of 4.0 M parameters on 8 x 8 x 8 latents: (64, 128) channels, cheap cross-attention at 4 x 4 only."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=EMBEDDING_SIZE,
        attention_head_dim=4,
        time_cond_proj_dim=time_cond_proj_dim,
    )


class Denoiser(nn.Module):
    """Text encoder and UNet as one module, which predicts noise from noisy latents, timesteps and token ids."""

    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        embeds = self.text_encoder(tokens).last_hidden_state
        return self.unet(latents, timesteps, encoder_hidden_states=embeds).sample


def train_teacher(
    data: CaptionedLatents,
    folder: Path,
    seed: int,
    cycles: tuple[StageConfig, StageConfig] = (FIRST_CYCLE, SECOND_CYCLE),
) -> Denoiser:
    """Train the teacher; `folder` keeps the states to resume from."""
    # Make the networks and the tokens.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    tokenizer = new_tokenizer()
    model = Denoiser(new_text_encoder(tokenizer), new_unet()).to(device)
    tokens, empty = tokenize(tokenizer, data.captions), tokenize(tokenizer, [""])
    schedule = noise_schedule()

    # The loss of a batch.
    def loss(denoiser: nn.Module, _: nn.Module, indices: Tensor, generator: torch.Generator) -> Tensor:
        # Draw dropped captions, noise and timesteps.
        x_0 = data.latents[indices]
        dropped = torch.rand(len(indices), 1, generator=generator) < _CAPTION_DROPOUT
        prompt = torch.where(dropped, empty, tokens[indices])
        noise = torch.randn(x_0.shape, generator=generator)
        t = torch.randint(1000, (len(indices),), generator=generator)

        # Predict the noise, and weigh its error.
        x_t = schedule.add_noise(x_0, noise, t)  # type: ignore[arg-type]
        snr = compute_snr(schedule, t)
        weights = (snr.clamp(max=_SNR_GAMMA) / snr).to(device)
        error = denoiser(x_t.to(device), t.to(device), prompt.to(device)) - noise.to(device)
        return (weights * error.square().mean(dim=(1, 2, 3))).mean()

    # Train in two cycles.
    trained = run_cycles(model, [loss] * len(cycles), len(data.latents), cycles, StageRun("teacher", folder, seed))
    assert isinstance(trained, Denoiser)
    return trained
