"""Chooses the images that a report shows, and puts them into the page as data.

    slider        grids of the same prompts and noise, spread evenly over the run
    alarms        the pictures that the guard wrote, the latest ones
    pairs         the first and the latest evaluation, image by image
    extremes      the best and the worst images by each reward
    disputes      images that one reward ranks high and another low

A page stays small: files up to 100 kB go in as they are, larger ones as JPEG (quality 90, colours at full resolution).
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations, zip_longest
from pathlib import Path

from PIL import Image

from rlcm_fast.report.reading import EvaluatedImages, RunData, Scored

_MOST_FRAMES = 24
_MOST_ALARMS = 3
_MOST_PAIRS = 8
_MOST_REWARDS = 8
_MOST_DISPUTES = 6
_EXTREMES = 4
_AS_IS = 100_000  # bytes
_GRID_WIDTH, _IMAGE_WIDTH = 1280, 1024  # pixels


@dataclass(frozen=True)
class Picture:
    """An image of the page."""

    source: str  # a data: URI
    width: int  # pixels
    height: int
    alt: str

    @property
    def shown_width(self) -> int:
        """CSS pixels: full size, and small images magnified by a whole number to about 192."""
        return self.width * max(1, round(192 / self.width))


@dataclass(frozen=True)
class Frame:
    """A picture of many images, after so many iterations."""

    iteration: int
    picture: Picture


@dataclass(frozen=True)
class Judged:
    """An image with its prompt and what rewards say of it."""

    prompt: str
    picture: Picture
    scores: Mapping[str, float]  # by reward


@dataclass(frozen=True)
class Pair:
    """An image before and after training."""

    before: Judged
    after: Judged

    @property
    def rows(self) -> list[tuple[str, float | None, float | None]]:
        """Returns (reward, score before, score after)."""
        names = dict.fromkeys([*self.before.scores, *self.after.scores])
        return [(name, self.before.scores.get(name), self.after.scores.get(name)) for name in names]


@dataclass(frozen=True)
class Extremes:
    """What a reward likes best and least."""

    reward: str
    best: Sequence[Judged]
    worst: Sequence[Judged]


@dataclass(frozen=True)
class Dispute:
    """An image that two rewards rank differently."""

    image: Judged
    liked_by: str
    liked_rank: int
    disliked_by: str
    disliked_rank: int
    num_images: int


def frames(run: RunData) -> list[Frame]:
    """Returns grids of the whole run, the first and the last among them."""
    return _frames(_spread(run.grids, _MOST_FRAMES), "Grid of fixed prompts and noise")


def alarms(run: RunData) -> list[Frame]:
    """Returns the latest pictures of the guard: the start model's images beside those with the weights of then."""
    return _frames(run.guard_pictures[-_MOST_ALARMS:], "Images of the start model and those that alarmed the guard,")


def _frames(files: Sequence[tuple[int, Path]], what: str) -> list[Frame]:
    found = []
    for iteration, path in files:
        picture = load(path, f"{what} after {iteration} iterations", _GRID_WIDTH)
        if picture:
            found.append(Frame(iteration, picture))
    return found


def pairs(run: RunData) -> list[Pair]:
    """Returns images of the first evaluation beside the same prompts and noise of the latest."""
    if len(run.evaluations) < 2:
        return []
    first, last = run.evaluations
    before = {image.number: image for image in first.images if image.file}
    both = [image for image in last.images if image.file and image.number in before]
    found = []
    for image in varied(both, _MOST_PAIRS):
        old = _judged(before[image.number], f"Before, after {first.iteration} iterations")
        new = _judged(image, f"After {last.iteration} iterations")
        if old and new:
            found.append(Pair(old, new))
    return found


def extremes(evaluation: EvaluatedImages) -> list[Extremes]:
    """Returns the best and the worst of the kept images by each reward; none for a reward that is constant."""
    found = []
    for key in evaluation.keys[:_MOST_REWARDS]:
        ranked = sorted((image for image in _kept(evaluation) if key in image.scores), key=lambda i: -i.scores[key])
        if len(ranked) < 2 or ranked[0].scores[key] == ranked[-1].scores[key]:
            continue
        count = min(_EXTREMES, len(ranked) // 2)
        best = [_judged(image, f"Rank {rank} by {short(key)}") for rank, image in enumerate(ranked[:count], start=1)]
        worst = [_judged(image, f"Among the worst by {short(key)}") for image in reversed(ranked[-count:])]
        found.append(Extremes(short(key), [i for i in best if i], [i for i in worst if i]))
    return found


def disputes(evaluation: EvaluatedImages) -> list[Dispute]:
    """Returns the images with the largest distance between their ranks by two rewards, each image once."""
    # Rank all images by each reward; ranks have no unit, so rewards of any scale compare.
    ranks = {key: ranks_by(evaluation, key) for key in evaluation.keys[:_MOST_REWARDS]}
    ranks = {key: of_key for key, of_key in ranks.items() if len(of_key) > 1}

    # Take the widest gaps, wherever they are.
    gaps = []
    for image in _kept(evaluation):
        for liked, disliked in permutations(ranks, 2):
            if image.number in ranks[liked] and image.number in ranks[disliked]:
                gap = ranks[disliked][image.number] - ranks[liked][image.number]
                gaps.append((gap, image, liked, disliked))
    gaps.sort(key=lambda found: (-found[0], found[1].number))
    chosen: dict[int, Dispute] = {}
    for gap, image, liked, disliked in gaps:
        if len(chosen) == _MOST_DISPUTES or 2 * gap < len(evaluation.images):
            break
        judged = (
            None if image.number in chosen else _judged(image, f"Liked by {short(liked)}, not by {short(disliked)}")
        )
        if judged:
            best, worst = ranks[liked][image.number], ranks[disliked][image.number]
            chosen[image.number] = Dispute(judged, short(liked), best, short(disliked), worst, len(evaluation.images))
    return list(chosen.values())


def ranks_by(evaluation: EvaluatedImages, key: str) -> dict[int, int]:
    """Returns the rank of each image by a reward, from 1 for the best; images with equal scores share the middle rank.

    Nothing for a reward that is constant.
    """
    scores = {image.number: image.scores[key] for image in evaluation.images if key in image.scores}
    descending = sorted(scores.values(), reverse=True)
    if not descending or descending[0] == descending[-1]:
        return {}
    first = {score: place for place, score in reversed(list(enumerate(descending, start=1)))}
    last = {score: place for place, score in enumerate(descending, start=1)}
    return {number: (first[score] + last[score]) // 2 for number, score in scores.items()}


def short(key: str) -> str:
    """Returns the reward of a metric's key: NAME of eval/NAME."""
    return key.removeprefix("eval/")


def load(path: Path, alt: str, width: int = _IMAGE_WIDTH) -> Picture | None:
    """Returns a picture, no wider than `width` pixels; None if the file is no image."""
    try:
        status = path.stat()
        source, size = _encoded(path, status.st_mtime_ns, width)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None
    return Picture(source, *size, alt)


@lru_cache(maxsize=512)  # a report that is renewed during a run reads only what is new
def _encoded(path: Path, _changed: int, width: int) -> tuple[str, tuple[int, int]]:
    content = path.read_bytes()
    with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
        image.load()
        kind = "png"
        if len(content) > _AS_IS:
            smaller = image.convert("RGB")
            smaller.thumbnail((width, 4 * width))
            file = io.BytesIO()
            smaller.save(file, "JPEG", quality=90, subsampling=0)
            kind, content, image = "jpeg", file.getvalue(), smaller
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}", image.size


def _judged(image: Scored, role: str) -> Judged | None:
    picture = load(image.file, f"{role}: {image.prompt}") if image.file else None
    return picture and Judged(image.prompt, picture, {short(key): score for key, score in image.scores.items()})


def _kept(evaluation: EvaluatedImages) -> list[Scored]:
    return [image for image in evaluation.images if image.file]


def varied(images: Sequence[Scored], most: int) -> list[Scored]:
    """Returns at most `most` of the images: one of each prompt, then a second one, and so on."""
    by_prompt: dict[str, list[Scored]] = {}
    for image in images:
        by_prompt.setdefault(image.prompt, []).append(image)
    turns = zip_longest(*by_prompt.values())
    return [image for turn in turns for image in turn if image is not None][:most]


def _spread(items: Sequence, most: int) -> list:
    """Returns at most `most` items, spread evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[index * (len(items) - 1) // (most - 1)] for index in range(most)]
