"""The pictures that show why a guard spoke: images of the same prompts and seeds, of the start model and of now.

    run_dir/guard/start.safetensors   the start model's images of the first prompts, 8 bits a channel
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


def first_pictures(rows: Tensor, images: Tensor) -> list[tuple[int, Tensor]]:
    """Returns those of images (B, 3, H, W) in [0, 1] that a guard shows: the row and (3, H, W) uint8 on the CPU.

    rows: (B,) int64, the prompts of the images; the first few are shown.
    """
    numbered = zip(rows.tolist(), images, strict=True)
    return [(row, _eight_bits(image)) for row, image in numbered if row < NUM_PICTURES]


@dataclass(frozen=True)
class GuardPictures:
    """Keeps the start model's pictures and compares others with them."""

    folder: Path  # run_dir/guard

    def keep(self, pictures: Sequence[Tensor]) -> None:
        """Writes the start model's pictures, each (3, H, W) in [0, 1]; their sizes may differ."""
        if not parallel.is_main():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        named = {f"{number:02d}": _eight_bits(picture) for number, picture in enumerate(pictures)}
        write_tensors(self.folder / "start.safetensors", named)

    def file(self, iteration: int) -> Path:
        """Returns where the picture after so many iterations lies, if there is one."""
        return self.folder / f"{iteration:06d}.png"

    def compare(self, iteration: int, pictures: Sequence[Tensor], texts: Sequence[str]) -> Path:
        """Writes n pictures (3, H, W) of n texts beside the start model's; returns the file."""
        path = self.file(iteration)
        if not parallel.is_main() or len(pictures) == 0:
            return path
        start = self._start()
        images, captions = list(pictures), [f"now: {text}" for text in texts]
        if [picture.shape for picture in start] == [picture.shape for picture in images]:
            images = [image for pair in zip(start, pictures, strict=True) for image in pair]
            captions = [f"{when}: {text}" for text in texts for when in ("start", "now")]
        self.folder.mkdir(parents=True, exist_ok=True)
        captioned_grid(images, captions, columns=4).save(path)
        return path

    def _start(self) -> list[Tensor]:
        path = self.folder / "start.safetensors"
        kept = load_file(path) if path.is_file() else {}
        return [kept[name].float() / 255 for name in sorted(kept)]


def _eight_bits(picture: Tensor) -> Tensor:
    return (picture.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).contiguous()
