"""Pictures that models with real weights can judge: rendered text, and photographs of scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def written(text: str, size: int = 160) -> Tensor:
    """Black text on a white square, (1, 3, size, size) float32 in [0, 1]; a line may be 12 characters long."""
    picture = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size // 8)
    ImageDraw.Draw(picture).multiline_text((size // 16, size // 4), text, fill="black", font=font)
    return as_images(np.array(picture))


def photograph(name: str) -> Tensor:
    """astronaut, chelsea (a cat) or coffee, (1, 3, H, W) float32 in [0, 1]; skips the test without scikit-image."""
    return as_images(getattr(pytest.importorskip("skimage.data"), name)())


def as_images(pixels: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
