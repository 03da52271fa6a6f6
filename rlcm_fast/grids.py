"""Draws image grids with a caption under each image, for run folders, `rlcm-fast sample` and the documentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TILE_WIDTH = 128  # pixels: an image is magnified as far as it fits, so a 64 x 64 image is doubled
_MARGIN = 6
_PAPER, _INK = "white", "black"


def captioned_grid(images: Tensor, texts: Sequence[str], columns: int) -> Image.Image:
    """One picture of images (B, 3, H, W) float in [0, 1], row by row, each with its wrapped text underneath."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images.shape={tuple(images.shape)} must be (B, 3, H, W) with B >= 1; pass RGB images")
    if len(texts) != len(images):
        raise ValueError(f"len(texts)={len(texts)} must equal len(images)={len(images)}; pass one text per image")
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")

    # Measure a cell: an image and its caption.
    tiles = _tiles(images)
    width, height = tiles[0].size
    font = ImageFont.load_default(size=max(11, width // 11))
    captions = ["\n".join(_wrap(text, font, width)) for text in texts]
    cell = (width + _MARGIN, height + _caption_height(captions, font) + _MARGIN)

    # Paste the cells onto paper.
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    grid = Image.new("RGB", (columns * cell[0] + _MARGIN, rows * cell[1] + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(grid)
    for index, (tile, caption) in enumerate(zip(tiles, captions, strict=True)):
        left, top = index % columns * cell[0] + _MARGIN, index // columns * cell[1] + _MARGIN
        grid.paste(tile, (left, top))
        draw.multiline_text((left, top + height), caption, fill=_INK, font=font)
    return grid


def _tiles(images: Tensor) -> list[Image.Image]:
    """The images, magnified by a whole number, so that pixels stay square."""
    pixels = (images.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    scale = max(1, _TILE_WIDTH // images.shape[3])
    return [Image.fromarray(np.repeat(np.repeat(image, scale, axis=0), scale, axis=1)) for image in pixels]


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines of whole words, no wider than `width` pixels; a wider word gets a line to itself."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _caption_height(captions: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    """The height of the tallest caption, in pixels."""
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    return max(round(draw.multiline_textbbox((0, 0), caption, font=font)[3]) for caption in captions) + 4
