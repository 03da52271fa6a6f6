"""The pretraining loss L_pre (arXiv 2401.12244): a policy's network on real images, beside the rewards.

With a training timestep t, noise eps and x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps:

    diffusion     |m(x_t) - target|^2, target eps, v or x_0 by prediction type: the loss that the model was made with;
                  t uniform over all T training timesteps
    consistency   min(SNR_t, 5) |f(x_t) - x_0|^2, SNR_t = alpha_bar_t / (1 - alpha_bar_t), f = c_skip x_t + c_out x0hat;
                  t uniform over the less noisy half of them

both means over C, H, W, of one forward pass without guidance: captions are dropped for it instead (`drop_captions`),
and a network that is told its guidance is told none, as real images are samples of the data's own distribution.

Why this one for consistency models: `shapes/lcm` trained by a loss alone for 100 updates of 64 renders (AdamW, 1e-4),
256 4-step samples at guidance 4 of each kind of training caption; seeds 0 and 1, the last row only 0
(benchmarks/learning/pretraining_losses.py; this one was thought of after the others had been seen):

                                               detector, one shape   two shapes     diversity
    start                                      0.863                 0.665          0.252, 0.243
    this one                                   0.955, 0.965          0.736, 0.737   0.240, 0.249; 0.226, 0.232
    the same at all timesteps                  0.926, 0.934          0.659, 0.686   0.202, 0.205; 0.191, 0.190
    without the weight, at all timesteps       0.895, 0.918          0.638, 0.622   0.189, 0.217; 0.180, 0.202
    consistency training (2310.14189)          0.778, 0.608          0.545, 0.442   0.234, 0.249; 0.226, 0.237
    the same, from the start model, guidance 4 0.773                 0.567          0.249; 0.245

At high noise x_0 is no function of x_t, so the loss pulls f to the mean of all images there: layouts grow alike (real
renders have a diversity of 0.28). At low noise real images say how details look, which is what L_pre is for, and the
first steps of a sample are left to the rewards. The two losses that compare f with itself at the next lower timestep
did harm at this learning rate; an average of the weights as target, a third network, was not tried. Told the samples'
guidance in place of none, this loss leaves 0.940 and 0.714 (seed 0), at all timesteps 0.865, 0.893 and 0.628, 0.627.
"""

# N pairs, C H W latent, T training timesteps

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.trajectory import Conditioning

_SNR_CAP = 5.0  # gamma of arXiv 2303.09556


def pretraining_loss(
    policy: GaussianPolicy, x_0: Tensor, conditioning: Conditioning, generator: torch.Generator
) -> Tensor:
    """(N,) float32 with the gradient into the network; x_0 (N, C, H, W) float32, as `Backbone.encode_images` gives it.

    Timesteps and noise are drawn from `generator`, on its device.
    """
    levels = policy.schedule.levels
    t = torch.randint(len(levels.signal), (len(x_0),), generator=generator, device=generator.device).to(x_0.device)
    is_consistency = isinstance(policy, ConsistencyPolicy)
    t = t // 2 if is_consistency else t
    eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0.device)
    signal, noise = _column(levels.signal[t]), _column(levels.noise[t])
    x_t = signal * x_0 + noise * eps
    m = policy.unguided_output(x_t, t, conditioning)
    if is_consistency:
        of_x_t, of_m = levels.consistency[t].unbind(dim=1)
        f = _column(of_x_t) * x_t + _column(of_m) * m
        weight = (levels.signal[t] / levels.noise[t]).square().clamp(max=_SNR_CAP)  # (N,)
        return weight * (f - x_0).square().mean(dim=(1, 2, 3))
    of_x_0, of_eps = levels.target[t].unbind(dim=1)
    return (m - _column(of_x_0) * x_0 - _column(of_eps) * eps).square().mean(dim=(1, 2, 3))


def drop_captions(conditioning: Conditioning, share: float, generator: torch.Generator) -> Conditioning:
    """A random `share` of the samples gets the empty text that guidance leads away from: `negative_embeds`, needed."""
    if share == 0:
        return conditioning
    assert conditioning.negative_embeds is not None, "encode with_negative"
    num_samples, pooled = len(conditioning.index), conditioning.pooled_embeds
    dropped = torch.rand(num_samples, generator=generator, device=generator.device) < share
    if pooled is not None and conditioning.negative_pooled is not None:
        pooled = torch.cat([pooled, conditioning.negative_pooled])
    return replace(
        conditioning,
        prompt_embeds=torch.cat([conditioning.prompt_embeds, conditioning.negative_embeds]),
        pooled_embeds=pooled,
        index=conditioning.index.masked_fill(dropped.to(conditioning.index.device), len(conditioning.prompt_embeds)),
    )


def _column(values: Tensor) -> Tensor:
    return values[:, None, None, None]
