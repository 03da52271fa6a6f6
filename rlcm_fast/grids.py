"""Draws image grids with a caption under each image, for run folders, `rlcm-fast sample` and the documentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_TILE_WIDTH = 128  # pixels: an image is magnified as far as it fits, so a 64 x 64 image is doubled
_MARGIN = 6
_PAPER, _INK = "white", "black"


def captioned_grid(images: Tensor | Sequence[Tensor], texts: Sequence[str], columns: int) -> Image.Image:
    """One picture of images (B, 3, H, W) float in [0, 1], row by row, each with its wrapped text underneath.

    A sequence of images (3, H, W) may have several sizes: each lies in the middle of a cell that holds the largest.
    """
    _check(images, texts, columns)

    # Measure a cell: an image and its caption.
    tiles = _tiles(images)
    width, height = max(tile.width for tile in tiles), max(tile.height for tile in tiles)
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
        grid.paste(tile, (left + (width - tile.width) // 2, top + (height - tile.height) // 2))
        draw.multiline_text((left, top + height), caption, fill=_INK, font=font)
    return grid


def _check(images: Tensor | Sequence[Tensor], texts: Sequence[str], columns: int) -> None:
    shapes = [tuple(image.shape) for image in images]
    if not shapes or any(len(shape) != 3 or shape[0] != 3 for shape in shapes):
        found = tuple(images.shape) if isinstance(images, Tensor) else shapes
        raise ValueError(f"images.shape={found} must be (B, 3, H, W) with B >= 1; pass RGB images")
    if len(texts) != len(images):
        raise ValueError(f"len(texts)={len(texts)} must equal len(images)={len(images)}; pass one text per image")
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1")


def _tiles(images: Tensor | Sequence[Tensor]) -> list[Image.Image]:
    """The images, all magnified by the same whole number, so that pixels stay square."""
    scale = max(1, _TILE_WIDTH // max(image.shape[2] for image in images))
    tiles = []
    for image in images:
        pixels = (image.detach().float().cpu().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        tiles.append(Image.fromarray(np.repeat(np.repeat(pixels, scale, axis=0), scale, axis=1)))
    return tiles


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
