"""Two rewards that show whether images still look like ShapesWorld, whatever their caption; watch them in training.

    detector_confidence   the overlap of the largest shape with the shape that it resembles most; 0 if there is no shape
    render_distance       minus the energy distance between the images and real renders of the same captions,
                          -(2 E|x - y| - E|x - x'| - E|y - y'|), in an embedding; 0 if they are alike

The embedding is the latents of the shipped autoencoder's encoder, divided by the square root of their number. No
reward uses it, and it sees backgrounds and edges as well as where things are. The energy distance (Szekely and Rizzo,
2013) needs no covariances, which 128 images of 512 numbers could not provide. Its means over pairs of different images
are unbiased, so the reward may also lie slightly above 0.
"""

# B images, G groups of k images, F = 2 E numbers that describe one image, E numbers of the embedding

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor

from rlcm_fast.shapes.detector import detect
from rlcm_fast.shapes.grammar import parse
from rlcm_fast.shapes.renderer import render
from rlcm_fast.shapes.scenes import scene_of
from rlcm_fast.trajectory import Prompt

_VAE = Path(__file__).parent / "models" / "lcm" / "vae"


class DetectorConfidence:
    """How much the largest thing in the image resembles any of the shapes, in [0, 1]."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) in [0, 1]; ignores the prompts."""
        return torch.tensor([found[0].confidence if found else 0.0 for found in detect(images)])


class RenderDistance:
    """Minus the energy distance between a group of images and as many renders of the same captions."""

    scope = "set"

    def __init__(self) -> None:
        self._vae = AutoencoderTiny.from_pretrained(str(_VAE), torch_dtype=torch.float32).eval()

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The embeddings of images (B, 3, 64, 64) in [0, 1] and of a render of each caption, (B, 2 E) float32.

        The n-th occurrence of a caption in a call always gets the same render.
        """
        seen: Counter[str] = Counter()
        renders = []
        for prompt in prompts:
            rng = np.random.default_rng([zlib.crc32(prompt.text.encode()), seen[prompt.text]])
            seen[prompt.text] += 1
            renders.append(np.asarray(render(scene_of(parse(prompt.text), rng)), dtype=np.float32) / 255)
        real = torch.from_numpy(np.stack(renders)).movedim(3, 1)
        return torch.cat([self._embedded(images.detach().float().cpu()), self._embedded(real)], dim=1)

    def value(self, described: Tensor) -> Tensor:
        """The values (G,) float32 of groups described (G, k, 2 E) float32; just -2 |x - y| for groups of one image."""
        x, y = described.double().chunk(2, dim=2)
        across = torch.cdist(x, y).mean(dim=(1, 2))
        return -(2 * across - _mean_distance(x) - _mean_distance(y)).float()

    @torch.no_grad()
    def _embedded(self, images: Tensor) -> Tensor:
        latents = self._vae.encode(images * 2 - 1).latents.flatten(1)  # pyright: ignore[reportAttributeAccessIssue]
        return latents / latents.shape[1] ** 0.5


def _mean_distance(points: Tensor) -> Tensor:
    """The mean distance (G,) between two different points of each group (G, k, E); 0 for one point."""
    if points.shape[1] < 2:
        return points.new_zeros(len(points))
    return torch.stack([torch.pdist(group).mean() for group in points])
