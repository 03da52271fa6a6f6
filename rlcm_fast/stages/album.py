"""Keeps some of an evaluation's images, with the scores of all, for people to look at: which is best, which got worse?

Prompts and noise are the same at every evaluation, so image i of two evaluations is a pair.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.trajectory import Prompt

Picture = tuple[int, bytes]  # the number of the prompt, a PNG


@dataclass
class Album:
    """The images of one evaluation; at most `most` of each set of prompts are kept as PNG, the same every time."""

    most: int = 0
    scores: list[dict[str, Any]] = field(default_factory=list)
    """A row for each image: its number, its prompt, its scores by the key of their metric, the name of its file."""
    files: dict[str, bytes] = field(default_factory=dict)

    def pictures(self, rows: Tensor, images: Tensor, num_images: int) -> Iterator[Picture]:
        """Yields those of the images (B, 3, H, W) in [0, 1] that are to be kept; `rows` (B,) are their prompts."""
        kept = self._kept(num_images)
        for row, image in zip(rows.tolist(), images, strict=True):
            if row in kept:
                yield row, _png(image)

    def add(self, prompts: Sequence[Prompt], pictures: Sequence[Picture], scores: Mapping[str, Tensor]) -> None:
        """Adds the images of `prompts`: the kept ones, and what each reward said, (N,) or NaN where it failed."""
        first, kept = len(self.scores), dict(pictures)
        for row, prompt in enumerate(prompts):
            of_image = {key: values[row].item() for key, values in scores.items()}
            entry: dict[str, Any] = {"image": first + row, "prompt": prompt.text, "scores": of_image}
            if row in kept:
                entry["file"] = f"{first + row:04d}.png"
                self.files[entry["file"]] = kept[row]
            self.scores.append(entry)

    def _kept(self, num_images: int) -> frozenset[int]:
        # drawn at random, because prompts repeat: every second image may be of half the prompts
        order = torch.randperm(num_images, generator=parallel.generator(0, num_images))
        return frozenset(order[: self.most].tolist())


def _png(image: Tensor) -> bytes:
    """Returns an image (3, H, W) as a PNG: without loss, so that rewards may score it again."""
    pixels = (image.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)  # 512 x 512 of noise: 9 ms, at level 6 24 ms
    return file.getvalue()
