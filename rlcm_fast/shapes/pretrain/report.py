"""Scores the models with the detector and draws a grid: the table and the picture of the folder's README.

Stock diffusers pipelines draw the images, without any of our code. The captions are spread evenly over the one-shape
and two-shape captions of a split, and the noise comes from fixed seeds.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import LatentConsistencyModelPipeline, StableDiffusionPipeline
from torch import Tensor
from tqdm import tqdm

from rlcm_fast.grids import captioned_grid
from rlcm_fast.shapes.detector import score_images
from rlcm_fast.shapes.grammar import Caption, one_shape_captions, two_shape_captions

TEACHER_GUIDANCE, LCM_GUIDANCE = 4.0, 4.0
_TEACHER_STEPS, _LCM_STEPS = (25, 50), (1, 2, 4, 8)
_GRID_ROWS = (("lcm", 1), ("lcm", 2), ("lcm", 4), ("lcm", 8), ("teacher", 50))
_BATCH_SIZE = 50
_KINDS = {"one": one_shape_captions, "two": two_shape_captions}


def write_report(folder: Path, seed: int, num_images: int) -> None:
    """Write scores.csv and grid.png into `folder`, beside teacher/ and lcm/."""
    rows = list(_rows(folder, seed, num_images))
    with (folder / "scores.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    _write_grid(folder, seed)


def _rows(folder: Path, seed: int, num_images: int) -> Iterator[dict[str, Any]]:
    """One row per model, step count, kind of caption and split; each kind gets half of `num_images`."""
    runs = [("lcm", steps) for steps in _LCM_STEPS] + [("teacher", steps) for steps in _TEACHER_STEPS]
    for name, steps in tqdm(runs, desc="scoring"):
        pipeline = _load(folder, name)
        for split in ("training", "held-out"):
            for kind in _KINDS:
                captions = _captions(kind, split == "held-out", num_images // 2, seed)
                # Draw and score the images of one cell of the table.
                images = draw(pipeline, captions, steps, _guidance(name), seed)
                scores = score_images(images, captions).double()
                yield {
                    "model": name,
                    "steps": steps,
                    "guidance_scale": _guidance(name),
                    "split": split,
                    "shapes": kind,
                    "num_images": len(captions),
                    "score_mean": round(scores.mean().item(), 4),
                    "score_standard_error": round(scores.std().item() / len(captions) ** 0.5, 4),
                    "share_perfect": round((scores > 0.999).double().mean().item(), 4),
                }


def draw(pipeline: Any, captions: list[Caption], steps: int, guidance_scale: float, seed: int) -> Tensor:
    """Draw images (N, 3, 64, 64) in [0, 1]; the batch that begins at caption i has the noise of seed + i."""
    batches = []
    for first in range(0, len(captions), _BATCH_SIZE):
        generator = torch.Generator().manual_seed(seed + first)
        texts = [str(caption) for caption in captions[first : first + _BATCH_SIZE]]
        result = pipeline(
            texts, num_inference_steps=steps, guidance_scale=guidance_scale, generator=generator, output_type="pt"
        )
        batches.append(result.images.float().cpu())
    return torch.cat(batches)


def _captions(kind: str, held_out: bool, count: int, seed: int) -> list[Caption]:
    """The texts of `count` images: every caption equally often, in a random order."""
    captions = _KINDS[kind](held_out)
    order = np.random.default_rng(seed).permutation(max(count, len(captions)))
    return [captions[index % len(captions)] for index in order[:count]]


def _guidance(name: str) -> float:
    return {"teacher": TEACHER_GUIDANCE, "lcm": LCM_GUIDANCE}[name]


def _load(folder: Path, name: str) -> Any:
    kind = {"teacher": StableDiffusionPipeline, "lcm": LatentConsistencyModelPipeline}[name]
    pipeline = kind.from_pretrained(folder / name, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def _write_grid(folder: Path, seed: int) -> None:
    """Write a grid of eight captions with a row for each sampler: the LCM by step count, then the teacher."""
    captions = _captions("one", False, 2, seed) + _captions("one", True, 1, seed)
    captions += _captions("two", False, 3, seed) + _captions("two", True, 2, seed)
    images, texts = [], []
    for name, steps in _GRID_ROWS:
        pictures = draw(_load(folder, name), captions, steps, _guidance(name), seed)
        scores = score_images(pictures, captions).tolist()
        images.append(pictures)
        texts += [f"{name} {steps}: {c} [{score:.2f}]" for c, score in zip(captions, scores, strict=True)]
    captioned_grid(torch.cat(images), texts, columns=len(captions)).save(folder / "grid.png")
