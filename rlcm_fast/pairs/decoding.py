"""From an undecoded row to pixels: runs in the worker processes."""

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


@dataclass(frozen=True)
class Decoder:
    """`decoder[row]` is a pair; with DataLoader's `batch_sampler` the rows come from the main process."""

    source: Source
    size: tuple[int, int]  # height, width

    def __getitem__(self, row: Row) -> tuple[Tensor, str]:
        """(3, H, W) uint8 and the caption."""
        image, text = self._function(row.image) if self.source.kind == "function" else (_open(row.image), row.text)
        if not (isinstance(image, Image.Image) and isinstance(text, str)):
            raise ValueError(f"{FIELD}={self.source.text} returned {type(image)}, {type(text)}; return PIL.Image, str")
        height, width = self.size
        # The middle of the image at the wanted ratio of sides, scaled; both scalings of PIL are antialiased.
        fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1), text

    @cached_property
    def _function(self) -> Callable[[Any], tuple[Image.Image, str]]:
        return load_class(self.source.path, BUILT_IN, FIELD)


def collate(pairs: list[tuple[Tensor, str]]) -> tuple[Tensor, list[str]]:
    """(B, 3, H, W) uint8 and B captions."""
    return torch.stack([image for image, _ in pairs]), [text for _, text in pairs]


def _open(image: Any) -> Image.Image:
    """As datasets opens it: turned as its EXIF says, from bytes, a file or the hub."""
    import datasets

    try:
        return datasets.Image().decode_example(image)
    except (OSError, SyntaxError) as error:  # the latter of broken PNGs
        raise ValueError(f"{FIELD}: {error}; take it out of the data, or repair it") from error
