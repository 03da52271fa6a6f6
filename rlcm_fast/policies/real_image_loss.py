"""The loss on real images, L_pre of arXiv 2401.12244: it trains the network of a policy beside the rewards.

With a training timestep t, noise eps and x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps:

    diffusion     |m(x_t) - target|^2, target eps, v or x_0 by prediction type: the loss that the model was made with;
                  t uniform over all T training timesteps
    consistency   min(SNR_t, 5) |f(x_t) - x_0|^2, SNR_t = alpha_bar_t / (1 - alpha_bar_t), f = c_skip x_t + c_out x0hat;
                  t uniform over the less noisy half of them

Both are means over C, H, W of one forward pass without guidance. Captions are dropped for guidance instead
(`drop_captions`). A network with a guidance embedding gets that of no guidance, because real images are samples of the
data distribution itself.

Why this loss for consistency models? `shapes/lcm` was trained by one loss alone for 100 updates of 64 renders (AdamW,
1e-4). The table scores 256 4-step samples at guidance 4 of each kind of training caption, for seeds 0 and 1 (last row:
seed 0). Run benchmarks/learning/pretraining_losses.py to repeat it. We found this loss after we had seen the others.

                                               detector, one shape   two shapes     diversity
    start                                      0.863                 0.665          0.252, 0.243
    this loss                                  0.955, 0.965          0.736, 0.737   0.240, 0.249; 0.226, 0.232
    the same at all timesteps                  0.926, 0.934          0.659, 0.686   0.202, 0.205; 0.191, 0.190
    without the weight, at all timesteps       0.895, 0.918          0.638, 0.622   0.189, 0.217; 0.180, 0.202
    consistency training (2310.14189)          0.778, 0.608          0.545, 0.442   0.234, 0.249; 0.226, 0.237
    the same, from the start model, guidance 4 0.773                 0.567          0.249; 0.245

At high noise x_0 is no function of x_t, so the loss pulls f to the mean of all images there, and layouts grow alike
(real renders have a diversity of 0.28). At low noise real images show how details look, which is the purpose of L_pre;
the first steps of a sample are left to the rewards. The two losses that compare f with itself at the next lower
timestep did harm at this learning rate. A third network with averaged weights as target was not tried. With the
guidance of the samples as input, this loss reaches 0.940 and 0.714 (seed 0), and 0.865, 0.893 and 0.628, 0.627 at all
timesteps.
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


def real_image_loss(
    policy: GaussianPolicy, x_0: Tensor, conditioning: Conditioning, generator: torch.Generator
) -> Tensor:
    """Loss (N,) float32 with its gradient into the network, on x_0 (N, C, H, W) float32 from Backbone.encode_images.

    `generator` draws timesteps and noise on its device.
    """
    # Draw timesteps and noise, and add the noise to the images.
    levels = policy.schedule.levels
    t = torch.randint(len(levels.signal), (len(x_0),), generator=generator, device=generator.device).to(x_0.device)
    is_consistency = isinstance(policy, ConsistencyPolicy)
    t = t // 2 if is_consistency else t
    eps = torch.randn(x_0.shape, generator=generator, device=generator.device).to(x_0.device)
    signal, noise = _column(levels.signal[t]), _column(levels.noise[t])
    x_t = signal * x_0 + noise * eps

    # Compare the network output with its target.
    m = policy.unguided_output(x_t, t, conditioning)
    if is_consistency:
        x_t_factor, m_factor = levels.consistency[t].unbind(dim=1)
        f = _column(x_t_factor) * x_t + _column(m_factor) * m
        weight = (levels.signal[t] / levels.noise[t]).square().clamp(max=_SNR_CAP)  # (N,)
        return weight * (f - x_0).square().mean(dim=(1, 2, 3))
    x_0_factor, eps_factor = levels.target[t].unbind(dim=1)
    return (m - _column(x_0_factor) * x_0 - _column(eps_factor) * eps).square().mean(dim=(1, 2, 3))


def drop_captions(conditioning: Conditioning, share: float, generator: torch.Generator) -> Conditioning:
    """Replace the captions of a random `share` of the samples by the empty text, which needs `negative_embeds`."""
    if share == 0:
        return conditioning
    assert conditioning.negative_embeds is not None, "call encode with with_negative=True"
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
