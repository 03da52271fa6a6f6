"""Statistics of single images that need no model: what changes when a reward is hacked by gloss, grain or blank paper.

    colour_entropy   entropy of the colours in bits, each channel in 8 levels: 0 (one colour) to 9
    edge_density     share of pixels whose brightness differs from the next one's by more than 0.1
    saturation       mean of the largest minus the smallest channel: 0 (grey) to 1
    flat_area        share of blocks of 8 x 8 pixels whose brightness deviates by less than 0.01
    jpeg_kb          size as a JPEG of quality 95, in kB

Brightness is the mean of the channels. Differences are between neighbours, downwards and to the right.
"""

# B images of H x W pixels

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rlcm_fast.rewards.jpeg import jpeg_kilobytes
from rlcm_fast.trajectory import Prompt

_LEVELS = 8  # of a channel
_EDGE = 0.1  # least difference of brightness
_BLOCK, _FLAT = 8, 0.01  # pixels a side, most deviation of brightness
_QUALITY = 95


class ImageStatistics:
    """Describes images by the five statistics, in the order above."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Returns (B, 5) float32 on the CPU for images (B, 3, H, W) in [0, 1]; ignores the prompts."""
        images = images.detach().float().clamp(0, 1)
        brightness = images.mean(dim=1)  # (B, H, W)
        saturation = (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2))
        columns = [colour_entropy(images), edge_density(brightness), saturation, flat_area(brightness)]
        return torch.cat([torch.stack(columns, dim=1).cpu(), jpeg_kilobytes(images, _QUALITY)[:, None]], dim=1)


def colour_entropy(images: Tensor) -> Tensor:
    """Returns the entropy (B,) in bits of the histogram of 8 x 8 x 8 colours of images (B, 3, H, W)."""
    levels = (images.nan_to_num() * _LEVELS).long().clamp(max=_LEVELS - 1)
    colours = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]  # (B, H, W)
    counts = torch.zeros(len(images), _LEVELS**3, device=images.device)
    pixels = colours.flatten(1)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels, dtype=counts.dtype))
    shares = counts / pixels.shape[1]
    return -torch.special.xlogy(shares, shares).sum(dim=1) / torch.log(torch.tensor(2.0)).item()


def edge_density(brightness: Tensor) -> Tensor:
    """Returns the share (B,) of edges among the pixels of brightness (B, H, W) that have both neighbours."""
    down = brightness[:, 1:, :-1] - brightness[:, :-1, :-1]
    right = brightness[:, :-1, 1:] - brightness[:, :-1, :-1]
    return (torch.maximum(down.abs(), right.abs()) > _EDGE).float().mean(dim=(1, 2))


def flat_area(brightness: Tensor) -> Tensor:
    """Returns the share (B,) of flat blocks of brightness (B, H, W); a border narrower than a block is left out."""
    height, width = brightness.shape[1:]
    block = min(_BLOCK, height, width)
    mean = avg_pool2d(brightness[:, None], block)
    spread = brightness[:, None, : mean.shape[2] * block, : mean.shape[3] * block]
    centred = spread - mean.repeat_interleave(block, dim=2).repeat_interleave(block, dim=3)
    return (avg_pool2d(centred**2, block) < _FLAT**2).float().mean(dim=(1, 2, 3))
