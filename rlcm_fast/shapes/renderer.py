"""Draws scenes as 64 x 64 RGB images, deterministically, with anti-aliasing by four-fold supersampling."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw

from rlcm_fast.shapes.grammar import COLOURS
from rlcm_fast.shapes.scenes import IMAGE_SIZE, Background, PlacedObject, Scene

_SUPERSAMPLING = 4


def render(scene: Scene) -> Image.Image:
    """The scene as a 64 x 64 RGB image; later objects cover earlier ones."""
    size = IMAGE_SIZE * _SUPERSAMPLING
    image = np.asarray(_draw_background(scene.background), dtype=np.float32)
    for item in scene.objects:
        mask = Image.new("L", (size, size))
        draw_shape(ImageDraw.Draw(mask), item, _SUPERSAMPLING)
        coverage = np.asarray(mask.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX), dtype=np.float32) / 255
        image += coverage[..., None] * (np.array(COLOURS[item.colour], np.float32) - image)
    return Image.fromarray(image.round().astype(np.uint8))


def draw_shape(draw: ImageDraw.ImageDraw, item: PlacedObject, scale: float = 1.0) -> None:
    """Fill the shape with 255, with coordinates multiplied by `scale`."""
    x, y, radius = item.x * scale, item.y * scale, item.radius * scale
    if item.shape == "circle":
        radius *= 0.9  # to cover about as much as the other shapes of this radius
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        return
    draw.polygon(_vertices(item.shape, x, y, radius, math.radians(item.angle)), fill=255)


def _vertices(shape: str, x: float, y: float, radius: float, angle: float) -> list[tuple[float, float]]:
    """The corners in drawing order; at angle 0, a square lies on a side, and a triangle and a star point up."""
    count, first, inner = {"square": (4, -45, 1.0), "triangle": (3, -90, 1.0), "star": (10, -90, 0.42)}[shape]
    radii = [radius if index % 2 == 0 else radius * inner for index in range(count)]
    turns = [math.radians(first + 360 * index / count) + angle for index in range(count)]
    return [(x + r * math.cos(turn), y + r * math.sin(turn)) for r, turn in zip(radii, turns, strict=True)]


def _draw_background(background: Background) -> np.ndarray:
    """The background as an array (64, 64, 3) float32 in [0, 255]."""
    grid = (np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5) / IMAGE_SIZE - 0.5
    angle = math.radians(background.angle)
    ramp = grid[None, :] * math.cos(angle) + grid[:, None] * math.sin(angle)  # (64, 64), at most +- sqrt(1/2)
    share = np.clip(ramp / math.sqrt(2) + 0.5, 0, 1)[..., None]
    start, end = np.array(background.start, np.float32), np.array(background.end, np.float32)
    return start + share * (end - start)
