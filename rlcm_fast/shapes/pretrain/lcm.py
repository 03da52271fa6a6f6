"""Distils the teacher into a latent consistency model (Luo et al., arXiv 2310.04378, algorithm 1).

For a start t on the 50-step DDIM grid, a guidance scale w ~ U[w_min, w_max] and z_t ~ q(z_t | z_0):

    z_s   = DDIM steps of the teacher from t to s with its guided output (1 + w) eps_c - w eps_u
    loss  = huber( f(z_t, w, c, t), f_ema(z_s, w, c, s) ),   f = c_skip(t) z_t + c_out(t) x0hat(z_t, eps, t)

c_skip and c_out use sigma_data 0.5 and timestep scaling 10. The student learns the guidance scale through the
w-embedding (`time_cond_proj_dim`), so sampling needs one forward pass per step. `w` follows the paper: it is
guidance_scale - 1.

The teacher takes one step of 40 in the first cycle, s = t - 40, and three in the second, s = t - 120. After the first
cycle, the student still drew stars as the teacher does without guidance. The effect of guidance travels one link, from
s to t, per update, and longer links need fewer updates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from torch import Tensor, nn

from rlcm_fast.shapes.pretrain.dataset import CaptionedLatents
from rlcm_fast.shapes.pretrain.stage import StageConfig, StageRun, run_cycles
from rlcm_fast.shapes.pretrain.teacher import Denoiser, new_unet, noise_schedule
from rlcm_fast.shapes.pretrain.text import new_tokenizer, tokenize

FIRST_CYCLE = StageConfig(num_steps=1500, batch_size=48, lr=5e-4, ema_decay=0.95, weight_decay=0.0, warmup_steps=50)
SECOND_CYCLE = replace(FIRST_CYCLE, num_steps=1000)
GUIDANCE_RANGE = (1.5, 4.5)  # in units of `guidance_scale`
W_EMBEDDING_SIZE = 64
_GRID_STEP = 20  # timesteps between the 50 DDIM steps, of 1000
_SKIP = 40  # timesteps of one teacher step
_SKIPS = (1, 3)  # teacher steps from t to s, in each cycle
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0
_HUBER_C = 0.001


@dataclass(frozen=True)
class Condition:
    """The inputs of a UNet beside latents and timesteps."""

    prompt: Tensor  # (N, L, E) float32, text embeddings
    w: Tensor  # (N,) float32, guidance_scale - 1


@dataclass(frozen=True)
class _GuidedTeacher:
    """The teacher as a guided DDIM sampler."""

    unet: nn.Module
    empty: Tensor  # (1, L, E) float32, the text embedding of the empty caption
    alpha_bar: Tensor  # (1000,) float32

    def step(self, z_t: Tensor, t: Tensor, s: Tensor, condition: Condition) -> Tensor:
        """Take a step from t to s; the conditional and unconditional halves share a forward pass."""
        both = torch.cat([condition.prompt, self.empty.expand_as(condition.prompt)])
        eps_c, eps_u = self.unet(torch.cat([z_t, z_t]), torch.cat([t, t]), encoder_hidden_states=both).sample.chunk(2)
        eps = eps_c + _column(condition.w) * (eps_c - eps_u)
        return _mix(_x_0_hat(z_t, eps, self.alpha_bar[t]), eps, self.alpha_bar[s])


def distil(
    teacher: Denoiser,
    data: CaptionedLatents,
    folder: Path,
    seed: int,
    cycles: tuple[StageConfig, StageConfig] = (FIRST_CYCLE, SECOND_CYCLE),
) -> UNet2DConditionModel:
    """The trained student UNet, which starts from the teacher's weights; `folder` keeps the states to resume from."""
    # Start from the teacher; the w-embedding projection is new.
    device = next(teacher.parameters()).device
    torch.manual_seed(seed)
    student: Any = new_unet(W_EMBEDDING_SIZE).to(device)  # pyright: ignore[reportArgumentType]
    student.load_state_dict(teacher.unet.state_dict(), strict=False)

    # Encode the captions once.
    tokenizer = new_tokenizer()
    distinct, rows = _distinct_embeddings(teacher, tokenize(tokenizer, data.captions))
    empty = teacher.text_encoder(tokenize(tokenizer, [""]).to(device)).last_hidden_state
    alpha_bar = noise_schedule().alphas_cumprod.to(device)
    sampler = _GuidedTeacher(teacher.unet, empty, alpha_bar)

    # The loss of a batch; the teacher takes `num_skips` steps.
    def loss(
        num_skips: int, model: nn.Module, target: nn.Module, indices: Tensor, generator: torch.Generator
    ) -> Tensor:
        # Draw t, w and z_t.
        count = len(indices)
        x_0 = data.latents[indices].to(device)
        t = (torch.randint(1, 51, (count,), generator=generator) * _GRID_STEP - 1).to(device)
        low, high = GUIDANCE_RANGE
        w = (low + (high - low) * torch.rand(count, generator=generator) - 1).to(device)
        noise = torch.randn(x_0.shape, generator=generator).to(device)
        z_t = _mix(x_0, noise, alpha_bar[t])
        condition = Condition(distinct[rows[indices]], w)

        # Go from t to s with the teacher; predict z_0 there with the EMA weights.
        with torch.no_grad():
            z_s, s = z_t, t
            for _ in range(num_skips):
                start, s = s, (s - _SKIP).clamp(min=0)
                z_s = sampler.step(z_s, start, s, condition)
            goal = consistency(target, z_s, s, condition, alpha_bar)

        # Pull the prediction at t towards it.
        error = consistency(model, z_t, t, condition, alpha_bar) - goal
        return ((error.square() + _HUBER_C**2).sqrt() - _HUBER_C).mean()

    # Train in two cycles.
    losses = [partial(loss, num_skips) for num_skips in _SKIPS]
    trained = run_cycles(student, losses, len(data.latents), cycles, StageRun("lcm", folder, seed))
    assert isinstance(trained, UNet2DConditionModel)
    return trained


def consistency(unet: nn.Module, z_t: Tensor, t: Tensor, condition: Condition, alpha_bar: Tensor) -> Tensor:
    """The prediction f(z_t, w, c, t) of z_0 (N, 8, 8, 8)."""
    scaled = _column(t.float() * _TIMESTEP_SCALING)
    c_skip = _SIGMA_DATA**2 / (scaled**2 + _SIGMA_DATA**2)
    c_out = scaled / (scaled**2 + _SIGMA_DATA**2).sqrt()
    embedding = LatentConsistencyModelPipeline.get_guidance_scale_embedding(
        None,  # type: ignore[arg-type]  # the method uses no state
        condition.w.cpu(),
        W_EMBEDDING_SIZE,
    ).to(z_t.device)
    eps = unet(z_t, t, encoder_hidden_states=condition.prompt, timestep_cond=embedding).sample
    return c_skip * z_t + c_out * _x_0_hat(z_t, eps, alpha_bar[t])


@torch.no_grad()
def _distinct_embeddings(teacher: Denoiser, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The text embeddings (D, L, E) of the distinct captions, and the row of each sample (N,)."""
    distinct, rows = tokens.unique(dim=0, return_inverse=True)
    device = next(teacher.parameters()).device
    embeds = [teacher.text_encoder(part.to(device)).last_hidden_state for part in distinct.split(512)]
    return torch.cat(embeds), rows


def _x_0_hat(z_t: Tensor, eps: Tensor, alpha_bar: Tensor) -> Tensor:
    return (z_t - _column((1 - alpha_bar).sqrt()) * eps) / _column(alpha_bar.sqrt())


def _mix(x_0: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    return _column(alpha_bar.sqrt()) * x_0 + _column((1 - alpha_bar).sqrt()) * noise


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
