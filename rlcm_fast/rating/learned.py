"""The reward `ratings`: scores images by what a person preferred, learned from the ratings.jsonl of a run.

    ratings.jsonl -> images -> embedding -> Plackett-Luce head (preference.py) -> the score of a new image

So a taste that was rated by hand once trains further models, or the same one for longer, with nobody at the page.
"""

# B images of a micro-batch, E numbers of an embedding

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.rating.preference import Head, Ranking, fit
from rlcm_fast.rating.records import Rating, read_ratings
from rlcm_fast.rewards.diversity import OnEmbedding
from rlcm_fast.terminal import write_line
from rlcm_fast.trajectory import Prompt

_CHANCE = 0.55  # a share of right pairs below this is little better than a coin
_FEWEST = 10  # prompts


class Ratings(OnEmbedding):
    """A linear score in an embedding, fitted to recorded ratings."""

    scope = "image"

    def __init__(
        self, file: str, embedding: str = "thumbnails", embedding_arguments: Mapping[str, Any] | None = None
    ) -> None:
        """Reads the ratings and fits the head.

        file        the ratings.jsonl of a run, whose images lie beside it
        embedding   thumbnails (8 x 8 pixels), shapes (what ShapesWorld's detector finds), clip, dinov2, or
                    package.module:Class, called with (images, prompts), which returns (B, E)
        """
        path = Path(file)
        ratings = [rating for rating in read_ratings(path) if rating.ranks is not None]
        if len(ratings) < _FEWEST:
            raise ValueError(f"file={file} has {len(ratings)} rated prompts; rate {_FEWEST} or more, better 200")
        super().__init__(embedding, embedding_arguments)
        self._head = self._fitted(path.parent, ratings)

        # Say what it is worth.
        share, pairs = self._head.accuracy, self._head.num_pairs
        line = f"{file}: {len(ratings)} prompts, {pairs} pairs; predicts {share:.0%} of held-out pairs ({embedding})"
        little = "; that is little better than chance: rate more, or give another embedding"
        write_line(line + (little if share < _CHANCE else ""))

    @property
    def head(self) -> Head:
        """What was fitted."""
        return self._head

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) in [0, 1]; their deviation over the rated images was 1."""
        return self._head(self._embedding(images, prompts).float().cpu())

    def _fitted(self, folder: Path, ratings: Sequence[Rating]) -> Head:
        rows: dict[str, int] = {}  # an image may be in several ratings, as the start model's in comparisons
        embeddings: list[Tensor] = []
        rankings = []
        with torch.no_grad():
            for rating in ratings:
                new = [file for file in rating.images if file not in rows]
                if new:
                    pixels = torch.stack([_read(folder / file) for file in new])
                    embeddings.append(self._embedding(pixels, [Prompt(rating.prompt, rating.task)] * len(new)))
                    rows |= {file: len(rows) + place for place, file in enumerate(new)}
                assert rating.ranks is not None
                rankings.append(Ranking([rows[file] for file in rating.images], rating.ranks))
        return fit(torch.cat(embeddings).float().cpu(), rankings)


def _read(file: Path) -> Tensor:
    """Returns the image (3, H, W) float32 in [0, 1]; raises ValueError if it is not there."""
    try:
        pixels = np.asarray(Image.open(file).convert("RGB"))
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{file} of the ratings cannot be read; keep the folder ratings beside the file") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255
