"""Writes the images that a person is shown, lossless: a folder for each round, whose images a restart finds again."""

# H W pixels

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from rlcm_fast.faults import Fault

_SAME = 2.0  # grey levels of 255: a larger mean difference makes it another image; GPUs differ by less than 0.1


@dataclass(frozen=True)
class KeptImage:
    """An image that was described."""

    pixels: np.ndarray  # (H, W, 3) uint8
    png: bytes

    @classmethod
    def of(cls, pixels: np.ndarray) -> KeptImage:
        """Returns the image of pixels (H, W, 3) uint8."""
        return cls(pixels, _png(pixels))


def written(images: Path, name: str, kept: Sequence[KeptImage]) -> str:
    """Writes images into a folder of `images` and returns its name, `name`, name_2, ...: one that holds these or none.

    Raises:
        Fault: the disk is full.
    """
    for count in itertools.count(1):
        folder = images / (name if count == 1 else f"{name}_{count}")
        files = [folder / f"{place:03d}.png" for place in range(len(kept))]
        pairs = list(zip(files, kept, strict=True))
        if not all(is_same(file, image) for file, image in pairs if file.exists()):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        for file, image in pairs:
            if not file.exists():
                write_whole(file, image.png)
        return folder.name
    raise AssertionError


def is_same(file: Path, kept: KeptImage) -> bool:
    """Tells whether a file holds this image, up to what another GPU rounds."""
    try:
        there = np.asarray(Image.open(file).convert("RGB"), dtype=np.float32)
    except (OSError, SyntaxError, ValueError):  # half a file
        file.unlink(missing_ok=True)
        return True
    return there.shape == kept.pixels.shape and float(np.abs(there - kept.pixels).mean()) <= _SAME


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all; raises a Fault in one line if the disk is full."""
    partial = file.with_name(f".{file.name}")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        remedy = "free some space, then go on with --resume latest"
        raise Fault(f"{file} cannot be written ({error.strerror}): {remedy}") from error


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)  # 1024 x 1024: 0.05 s against 0.4 s at level 6
    return buffer.getvalue()
