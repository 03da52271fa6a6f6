"""Prepares images for a network as its image processor does, but on tensors: batched, on the device of the images.

    resize (bicubic, antialias) -> clamp to [0, 1] -> crop, squash or pad -> (x - mean) / std

PIL rounds to 8 bits and clamps after each direction of a resize; this stays in float32 and clamps once. A photograph
of 512 x 600 pixels differs from PIL's result by 0.0012 of the range on average, and at most by 0.024 (to 224 x 262),
0.029 (to 384 x 384) and 0.056 (to 800 x 938); tests/rewards/test_pixels.py. Without antialias it would be 0.015 and
0.41 (to 224 x 262).
"""

# B images of H x W pixels

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import interpolate, pad

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Preparation:
    """What a network wants of an image."""

    size: int  # side of the square that the network sees, in pixels
    mean: tuple[float, float, float] = CLIP_MEAN
    std: tuple[float, float, float] = CLIP_STD
    fit: Literal["crop", "squash", "pad"] = "crop"  # how an image that is no square becomes one; pad: with black
    shortest_side: int = 0  # to which the image is resized before it is cut; 0 takes `size`

    def __call__(self, images: Tensor) -> Tensor:
        """The pixels (B, 3, size, size) float32, normalised, of images (B, 3, H, W) in [0, 1], on their device."""
        images = images.float()
        if self.fit == "squash":
            pixels = resize(images, self.size, self.size)
        elif self.fit == "pad":
            pixels = center_pad(resize_longest_side(images, self.size), self.size)
        else:
            pixels = center_crop(resize_shortest_side(images, self.shortest_side or self.size), self.size)
        mean, std = (pixels.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels - mean) / std


def resize(images: Tensor, height: int, width: int) -> Tensor:
    """Resize images (B, 3, H, W) in [0, 1] to (B, 3, height, width); bicubic with antialias, clamped to [0, 1]."""
    if images.shape[-2:] == (height, width):
        return images.clamp(0, 1)
    return interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def resize_shortest_side(images: Tensor, size: int) -> Tensor:
    """Resize images (B, 3, H, W) so that the shortest side has `size` pixels; the other is rounded down."""
    height, width = images.shape[-2:]
    if height <= width:
        return resize(images, size, int(size * width / height))
    return resize(images, int(size * height / width), size)


def resize_longest_side(images: Tensor, size: int) -> Tensor:
    """Resize images (B, 3, H, W) so that the longest side has `size` pixels; the other is rounded."""
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    return resize(images, max(1, round(height * scale)), max(1, round(width * scale)))


def center_pad(images: Tensor, size: int) -> Tensor:
    """Surround images that are at most as large with black, to (B, 3, size, size); an odd rest is right and below."""
    below, right = size - images.shape[-2], size - images.shape[-1]
    return pad(images, (right // 2, right - right // 2, below // 2, below - below // 2))


def center_crop(images: Tensor, size: int) -> Tensor:
    """The central (B, 3, size, size) of images that are at least as large; an odd rest is cut right and below."""
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
