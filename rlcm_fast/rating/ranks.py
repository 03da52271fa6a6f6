"""Turns the order in which a person put the images of a prompt into ranks and scores.

Rank 1 is best. Tied images share the best rank of their tier, as in sport: 1, 2, 2, 4. The score of an image among n is

    score = (images that it beats - images that beat it) / (n - 1)

in [-1, 1]: the best of an order without ties has 1, the worst -1, neighbours differ by 2 / (n - 1), and the scores of a
prompt sum to 0. It is Borda's count, scaled; a tie counts half a win for each side.
"""

from __future__ import annotations

from collections.abc import Sequence


def ranks_of(tiers: Sequence[Sequence[int]], num_images: int) -> list[int]:
    """Returns the rank of each image for tiers of image numbers, best first; images in no tier tie for the last rank.

    Raises:
        ValueError: a number is not in [0, num_images), comes twice, or nothing is ranked.
    """
    named = [image for tier in tiers for image in tier]
    if not named or any(not tier for tier in tiers):
        raise ValueError("tiers: name at least one image in each tier, or skip the prompt")
    is_known = all(type(image) is int and 0 <= image < num_images for image in named)
    if not is_known or len(set(named)) < len(named):
        raise ValueError(f"tiers={[list(tier) for tier in tiers]} must name each of {num_images} images once at most")
    ranks = [len(named) + 1] * num_images
    better = 0
    for tier in tiers:
        for image in tier:
            ranks[image] = better + 1
        better += len(tier)
    return ranks


def check_ranks(ranks: Sequence[int], num_images: int) -> None:
    """Raises ValueError unless `ranks` has a whole number of 1 or more for each of num_images images."""
    if len(ranks) != num_images or not all(type(rank) is int and rank >= 1 for rank in ranks):
        raise ValueError(f"ranks={list(ranks)} must be {num_images} whole numbers from 1 (best) on")


def scores_of(ranks: Sequence[int]) -> list[float]:
    """Returns the score of each image in [-1, 1]; 0 for a single image."""
    others = max(1, len(ranks) - 1)
    return [(sum(other > rank for other in ranks) - sum(other < rank for other in ranks)) / others for rank in ranks]
