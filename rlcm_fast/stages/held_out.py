"""Held-out images: fixed prompts, noise that depends on the seed and the micro-batch alone, shared out among processes.

Micro-batch i has the noise of (seed, i) and goes to rank i mod world size.
"""

# B images of this process

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.stages.image_sizes import Run, Size
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class HeldOut:
    """The images to draw: one for each of `prompts`, with noise from `seed`, `micro_batch_size` at a time."""

    prompts: list[Prompt]
    seed: int
    micro_batch_size: int
    sizes: Sequence[Size] = ()  # the prompts take them in turn; empty: the model's

    @property
    def micro_batches(self) -> list[Run]:
        """The rows of each micro-batch, all of one size."""
        rows, num_sizes = torch.arange(len(self.prompts)), max(1, len(self.sizes))
        found = []
        for index in range(num_sizes):
            size = self.sizes[index] if self.sizes else None
            found += [Run(part, size) for part in rows[index::num_sizes].split(self.micro_batch_size) if len(part)]
        return found

    @property
    def of_rank(self) -> list[Run]:
        """The micro-batches of this rank."""
        return self.micro_batches[parallel.rank() :: parallel.world_size()]

    def draw(self, images: TextToImage) -> Iterator[tuple[Tensor, list[Prompt]]]:
        """Yields this rank's share of the images (B, 3, H, W) and their prompts, one micro-batch at a time.

        Under ZeRO-3 a forward pass needs all ranks: each rank takes part in every round and keeps only its
        micro-batches.
        """
        micro_batches = self.micro_batches
        for first in range(0, len(micro_batches), parallel.world_size()):
            index = first + parallel.rank()
            is_mine = index < len(micro_batches)
            x_0, batch = self._drawn(images, micro_batches, index if is_mine else first)
            if is_mine:
                yield images.decode(x_0), batch

    def draw_all(self, images: TextToImage) -> tuple[list[Tensor], list[Prompt]]:
        """Returns all images, each (3, H, W), and their prompts, size by size; every rank must call this.

        Only the main process decodes them; the others have none.
        """
        micro_batches = self.micro_batches
        pictures: list[Tensor] = []
        prompts: list[Prompt] = []
        for index in range(len(micro_batches)):
            x_0, batch = self._drawn(images, micro_batches, index)
            if parallel.is_main():
                pictures += images.decode(x_0)
                prompts += batch
        return pictures, prompts

    def _drawn(self, images: TextToImage, micro_batches: Sequence[Run], index: int) -> tuple[Tensor, list[Prompt]]:
        """Returns x_0 (B, C, H, W) of a micro-batch, drawn with its own noise, and its prompts."""
        run = micro_batches[index]
        batch = [self.prompts[row] for row in run.rows.tolist()]
        conditioning = images.sized(images.encode(batch), run.size)
        return images.sample(conditioning, parallel.generator(self.seed, index))[1], batch
