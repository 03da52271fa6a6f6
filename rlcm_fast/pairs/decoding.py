"""Decodes rows to pixels and captions, in the worker processes."""

# C H W image

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlcm_fast.bombs import bombs_are_errors
from rlcm_fast.pairs.reading import Row
from rlcm_fast.pairs.sources import BUILT_IN, FIELD, Source
from rlcm_fast.plugins import load_class


class BadPair(ValueError):
    """A mistake in a function that makes pairs; the message is one line."""


@dataclass(frozen=True)
class Unreadable:
    """A pair that cannot be read, and is skipped."""

    problem: str  # one line that names the file and the way out


Pair = tuple[Tensor, str]  # an image (3, H, W) uint8 and its caption


@dataclass(frozen=True)
class Batch:
    """The decoded pairs of a batch, and the problems of those that could not be read."""

    images: Tensor  # (B, 3, H, W) uint8
    texts: list[str]  # len B
    problems: list[str]


@dataclass(frozen=True)
class Decoder:
    """`decoder[row]` turns a row into a pair; DataLoader's `batch_sampler` brings the rows from the main process."""

    source: Source
    size: tuple[int, int]  # height, width

    def __getitems__(self, rows: list[Row]) -> list[Pair | Unreadable] | BadPair:
        """The pairs of a batch, or the BadPair that stopped it.

        A BadPair is returned, not raised, because torch puts the traceback of a worker into the message.
        """
        try:
            return [self[row] for row in rows]
        except BadPair as error:
            return error

    def __getitem__(self, row: Row) -> Pair | Unreadable:
        """The image (3, H, W) uint8 and its caption, or why they cannot be read.

        A broken image may raise anything: struct.error, zlib.error, EOFError, an index beyond the end.
        """
        if row.problem:
            return Unreadable(f"{FIELD}={self.source.text}: {row.problem}")
        try:
            image, text = self._function(row.image) if self.source.kind == "function" else (self._open(row), row.text)
            is_pair = isinstance(image, Image.Image) and isinstance(text, str)
            if is_pair:
                return self._pixels(image), text
        except Exception as error:  # noqa: BLE001  # see above
            said = " ".join(f"{type(error).__name__}: {error}".split())
            where = f"pair {row.image}" if isinstance(row.image, int) else row.file or f"the image of {row.text[:80]!r}"
            remedy = "take it out of the data, or repair it"
            return Unreadable(f"{FIELD}={self.source.text}: {where} cannot be read ({said}); {remedy}")
        raise BadPair(f"{FIELD}={self.source.text} returned {type(image)}, {type(text)}; return PIL.Image, str")

    def _pixels(self, image: Image.Image) -> Tensor:
        """The image (3, H, W) uint8: its middle at the wanted aspect ratio, scaled; PIL antialiases both ways."""
        height, width = self.size
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1)

    def _open(self, row: Row) -> Image.Image:
        """The image as datasets opens it, from bytes, a file or the hub, rotated as its EXIF data say."""
        import datasets

        if row.file and os.path.exists(row.file) and not os.path.isfile(row.file):
            raise OSError("it is no regular file")  # opening a pipe would wait for ever
        image: Any = row.image
        with bombs_are_errors():
            return datasets.Image().decode_example(image)

    @cached_property
    def _function(self) -> Callable[[Any], tuple[Image.Image, str]]:
        return load_class(self.source.path, BUILT_IN, FIELD)

    def collate(self, pairs: list[Pair | Unreadable] | BadPair) -> Batch | BadPair:
        """The batch, without the pairs that cannot be read, or the BadPair that stopped it."""
        if isinstance(pairs, BadPair):
            return pairs
        read = [pair for pair in pairs if not isinstance(pair, Unreadable)]
        problems = [pair.problem for pair in pairs if isinstance(pair, Unreadable)]
        images = torch.stack([image for image, _ in read]) if read else torch.empty(0, 3, *self.size, dtype=torch.uint8)
        return Batch(images, [text for _, text in read], problems)
