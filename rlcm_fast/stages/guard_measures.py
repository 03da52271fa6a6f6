"""What a guard measures on the evaluation's images, and the bands around the start model's values.

    band         start -+ max(z * standard error of the start's mean, floor * |start|)
    held-out     only the lower end: a reward that nobody optimises may rise
    distance     mean distance of an image to the start model's of the same seed, over the mean distance between two
                 of the start model's images: 0 at the start, about 1 if the images have nothing to do with them
    diversity    mean distance of any two images (across), of two images of the same prompt (within)

The standard error of a mean distance between N images follows from each image's mean distance d_i to the others: it is
2 std(d_i) / sqrt(N), the first term of Hoeffding's decomposition. Within prompts it is the deviation between prompts.
"""

# N images, F numbers of an embedding

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.config.guard import ACROSS, STATISTICS, WITHIN
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Seen:
    """What a guard keeps of the evaluation's images, those of all processes in the order of the prompts."""

    prompts: Sequence[Prompt]  # len N
    statistics: Tensor  # (N, 5) float32, image_statistics.py
    embedding: Tensor  # (N, F) float32
    pictures: Sequence[Tensor]  # of the first n prompts, each (3, H, W) float32 in [0, 1]

    @property
    def texts(self) -> list[str]:
        """What the pictures show."""
        return [prompt.text for prompt in self.prompts[: len(self.pictures)]]

    @classmethod
    def of(cls, described: Tensor, prompts: Sequence[Prompt], pictures: Sequence[Tensor]) -> Seen:
        """Takes descriptions (N, 5 + F) apart; pictures: images (3, H, W) in [0, 1] of the first prompts."""
        num_statistics = len(STATISTICS)
        return cls(prompts, described[:, :num_statistics], described[:, num_statistics:], pictures)

    @classmethod
    def joined(cls, parts: Sequence[Seen]) -> Seen:
        """Joins what several evaluations saw; the pictures are those of the first."""
        prompts = [prompt for part in parts for prompt in part.prompts]
        statistics = torch.cat([part.statistics for part in parts])
        embedding = torch.cat([part.embedding for part in parts])
        return cls(prompts, statistics, embedding, parts[0].pictures)


@dataclass(frozen=True)
class Measured:
    """A mean and its standard error."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Measured:
        """Returns those of values (N,)."""
        values = values.double()
        error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return cls(values.mean().item(), error)


@dataclass(frozen=True)
class Band:
    """The interval that a measure may lie in."""

    start: float
    half_width: float
    has_low: bool = True
    has_high: bool = True

    @property
    def low(self) -> float | None:
        return self.start - self.half_width if self.has_low else None

    @property
    def high(self) -> float | None:
        return self.start + self.half_width if self.has_high else None

    def told(self, value: float) -> str:
        """Returns on which side of the band a value lies, as part of a line."""
        side = "below" if self.low is not None and value < self.low else "above"
        ends = [f"{end:.3g}" for end in (self.low, self.high) if end is not None]
        return f"{value:.3g} is {side} its band ({' to '.join(ends)}; {self.start:.3g} at the start)"

    def excess(self, value: float) -> float:
        """Returns how far a value lies outside, in half-widths: 0 at an end, negative inside, -1 at the start."""
        if not math.isfinite(value):
            return math.inf
        above, below = value - self.start, self.start - value
        offset = max(above if self.has_high else -math.inf, below if self.has_low else -math.inf)
        if self.half_width == 0:  # the start model's images are all alike in this
            return math.inf if offset > 0 else -1.0
        return offset / self.half_width - 1


def image_measures(seen: Seen) -> dict[str, Measured]:
    """Returns the statistics and the diversity of images by name."""
    found = {name: Measured.of(seen.statistics[:, place]) for place, name in enumerate(STATISTICS)}
    if len(seen.prompts) > 1:
        found[ACROSS] = diversity_across(seen.embedding)
    within = diversity_within(seen.embedding, seen.prompts)
    return found if within is None else {**found, WITHIN: within}


def diversity_across(embedding: Tensor) -> Measured:
    """Returns the mean distance between two of N images, for their embedding (N, F)."""
    num_images = len(embedding)
    distances = torch.cdist(embedding.double(), embedding.double(), compute_mode="donot_use_mm_for_euclid_dist")
    of_images = distances.sum(dim=1) / (num_images - 1)  # (N,)
    error = 2 * of_images.std().item() / math.sqrt(num_images)
    return Measured(of_images.mean().item(), error)


def diversity_within(embedding: Tensor, prompts: Sequence[Prompt]) -> Measured | None:
    """Returns the mean distance between two images of the same prompt; None if each prompt has one image."""
    places: dict[Prompt, list[int]] = {}
    for place, prompt in enumerate(prompts):
        places.setdefault(prompt, []).append(place)
    groups = [embedding[rows].double() for rows in places.values() if len(rows) > 1]
    if not groups:
        return None
    return Measured.of(torch.stack([torch.pdist(group).mean() for group in groups]))


def distance_to_start(embedding: Tensor, start: Tensor, scale: float) -> float:
    """Returns the mean distance between rows of two embeddings (N, F), over `scale`, the start's diversity."""
    distance = (embedding.double() - start.double()).norm(dim=1).mean().item()
    return distance / scale if scale > 0 else distance
