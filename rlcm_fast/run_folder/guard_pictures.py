"""The pictures that show why a guard spoke: images of the same prompts and seeds, of the start model and of now.

    run_dir/guard/start.safetensors   the start model's first images, 8 bits a channel
    run_dir/guard/000012.png          start | now, side by side, with the weights after 12 iterations

Only the main process writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.engine.tensor_files import write_tensors
from rlcm_fast.grids import captioned_grid

NUM_PICTURES = 8  # of the start, and as many of now


@dataclass(frozen=True)
class GuardPictures:
    """Keeps the start model's pictures and compares others with them."""

    folder: Path  # run_dir/guard

    def keep(self, pictures: Tensor | None) -> None:
        """Writes the start model's pictures (n, 3, H, W); None on all processes but the main one."""
        if pictures is None or not parallel.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        eight_bits = (pictures.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
        write_tensors(self.folder / "start.safetensors", {"images": eight_bits.contiguous()})

    def compare(self, iteration: int, pictures: Tensor | None, texts: Sequence[str]) -> Path:
        """Writes pictures (n, 3, H, W) of n texts beside the start model's; returns the file."""
        path = self.folder / f"{iteration:06d}.png"
        if pictures is None or not parallel.is_main():
            return path
        now = pictures.detach().float().cpu()
        start = self._start()
        images, captions = list(now), [f"now: {text}" for text in texts]
        if start is not None and start.shape == now.shape:
            images = [image for pair in zip(start, now, strict=True) for image in pair]
            captions = [f"{when}: {text}" for text in texts for when in ("start", "now")]
        self.folder.mkdir(parents=True, exist_ok=True)
        captioned_grid(images, captions, columns=4).save(path)
        return path

    def _start(self) -> Tensor | None:
        path = self.folder / "start.safetensors"
        return load_file(path)["images"].float() / 255 if path.is_file() else None
