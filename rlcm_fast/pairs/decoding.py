"""Decodes rows to pixels and captions, in the worker processes."""

# C H W image

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlcm_fast.pairs.reading import Row
from rlcm_fast.pairs.sources import BUILT_IN, FIELD, Source
from rlcm_fast.plugins import load_class


class BadPair(ValueError):
    """A problem with a pair; the message is one line."""


@dataclass(frozen=True)
class Decoder:
    """`decoder[row]` turns a row into a pair; DataLoader's `batch_sampler` brings the rows from the main process."""

    source: Source
    size: tuple[int, int]  # height, width

    def __getitems__(self, rows: list[Row]) -> list[tuple[Tensor, str]] | BadPair:
        """The pairs of a batch, or the BadPair that stopped it.

        A BadPair is returned, not raised, because torch puts the traceback of a worker into the message.
        """
        try:
            return [self[row] for row in rows]
        except BadPair as error:
            return error

    def __getitem__(self, row: Row) -> tuple[Tensor, str]:
        """The image (3, H, W) uint8 and its caption."""
        image, text = self._function(row.image) if self.source.kind == "function" else (self._open(row), row.text)
        if not (isinstance(image, Image.Image) and isinstance(text, str)):
            raise BadPair(f"{FIELD}={self.source.text} returned {type(image)}, {type(text)}; return PIL.Image, str")
        height, width = self.size
        # Cut out the middle at the wanted aspect ratio and scale it; PIL antialiases both ways.
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1), text

    def _open(self, row: Row) -> Image.Image:
        """The image as datasets opens it, from bytes, a file or the hub, rotated as its EXIF data say."""
        import datasets

        image: Any = row.image
        try:
            return datasets.Image().decode_example(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # SyntaxError: broken PNGs
            where = row.file or f"the image of {row.text[:80]!r}"
            raise BadPair(
                f"{FIELD}={self.source.text}: {where} cannot be read ({error}); take it out of the data, or repair it"
            ) from error

    @cached_property
    def _function(self) -> Callable[[Any], tuple[Image.Image, str]]:
        return load_class(self.source.path, BUILT_IN, FIELD)


def collate(pairs: list[tuple[Tensor, str]] | BadPair) -> tuple[Tensor, list[str]] | BadPair:
    """The images (B, 3, H, W) uint8 and their B captions, or the BadPair that stopped the batch."""
    if isinstance(pairs, BadPair):
        return pairs
    return torch.stack([image for image, _ in pairs]), [text for _, text in pairs]
