"""Writes the images of the first and of the latest evaluation, with the scores of all images, into the run folder.

    evaluation/000000/0007.png        image 7, without loss; at most tracking.evaluation_images of them
    evaluation/000000/scores.jsonl    {"image": 7, "prompt": "...", "scores": {"eval/NAME": ...}, "file": "0007.png"}

The name is the number of finished iterations. Two evaluations at most are on the disk: a new one is complete before the
latest but the first goes.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from rlcm_fast.finite_json import finite_json
from rlcm_fast.grids import captioned_grid

FOLDER, SCORES = "evaluation", "scores.jsonl"
_PICTURED = 8  # images in the picture of an evaluation


def write_evaluation(
    run_dir: Path, iteration: int, scores: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]
) -> None:
    """Writes the evaluation after `iteration` iterations, then removes those between the first and this one.

    What a resumed run draws again is replaced, and what comes after it is removed. Raises OSError if the disk is full;
    then nothing is left of this evaluation.
    """
    # Write it under another name, so that a run that is killed here leaves no half of it.
    folder = run_dir / FOLDER / f"{iteration:06d}"
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        lines = "".join(finite_json(row) + "\n" for row in scores)
        (unfinished / SCORES).write_text(lines, encoding="utf-8")
        for name, content in files.items():
            (unfinished / name).write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unfinished, folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise

    # Keep the first and this one.
    for other in evaluations(run_dir)[1:]:
        if other != folder:
            with contextlib.suppress(OSError):
                shutil.rmtree(other)


def evaluation_picture(scores: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]) -> Image.Image:
    """Returns one picture of the first kept images, the same at every evaluation, with their prompts and scores."""
    images, captions = [], []
    for row in [row for row in scores if row.get("file") in files][:_PICTURED]:
        with Image.open(io.BytesIO(files[row["file"]]), formats=("PNG",)) as image:
            pixels = torch.from_numpy(np.array(image.convert("RGB")))
        images.append(pixels.permute(2, 0, 1) / 255)
        said = [f"{key.removeprefix('eval/')} {score:.4g}" for key, score in row["scores"].items()]
        captions.append(f"{row['prompt']}: {', '.join(said)}")
    return captioned_grid(images, captions, columns=4)


def evaluations(run_dir: Path) -> list[Path]:
    """Returns the folders of the evaluations that are there, the first one first."""
    found = (run_dir / FOLDER).glob("[0-9]*")
    return sorted((path for path in found if path.name.isdigit()), key=lambda path: int(path.name))
