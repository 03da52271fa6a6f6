"""The size of an image as a JPEG, the simplest reward of DDPO (arXiv 2305.13301) and RLCM (arXiv 2404.03673).

    compressibility = -kB,  incompressibility = +kB,     kB = bytes of the JPEG / 1000, encoded in memory by Pillow

The size is deterministic for a given Pillow build. The chroma is halved (4:2:0, Pillow's default), as in the code of
both papers.
"""

# B images of H x W pixels

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.trajectory import Prompt


def to_uint8(images: Tensor) -> Tensor:
    """Convert (B, 3, H, W) float in [0, 1] to (B, H, W, 3) uint8 on the CPU; clamp, and round as diffusers does."""
    # Round on the device of the images: a GPU then sends a quarter of the bytes, in one copy.
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()


def jpeg_kilobytes(images: Tensor, quality: int) -> Tensor:
    """The JPEG sizes of images (B, 3, H, W), in kB of 1000 bytes: (B,) float32 on the CPU."""
    sizes = [_jpeg_bytes(Image.fromarray(image), quality) for image in to_uint8(images).numpy()]
    return torch.tensor(sizes, dtype=torch.float32) / 1000


def _jpeg_bytes(image: Image.Image, quality: int) -> int:
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=quality)
    return buffer.tell()


class JpegCompressibility:
    """Minus the JPEG size in kB: smooth, plain images score best."""

    scope = "image"

    def __init__(self, quality: int = 95) -> None:
        """Set the JPEG quality of Pillow, 1 to 100; the papers use 95."""
        if isinstance(quality, bool) or not isinstance(quality, int) or not 1 <= quality <= 100:
            raise ValueError(f"quality={quality!r} is no JPEG quality; give an integer from 1 to 100, such as 95")
        self.quality = quality

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32, in kB, of images (B, 3, H, W) float32 in [0, 1]; ignores the prompts."""
        return -jpeg_kilobytes(images, self.quality)


class JpegIncompressibility(JpegCompressibility):
    """The JPEG size in kB: noisy, detailed images score best."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32, in kB, of images (B, 3, H, W) float32 in [0, 1]; ignores the prompts."""
        return jpeg_kilobytes(images, self.quality)
