"""What happens if a reward fails for an image: the run stops, or goes on without the image (`on_failure: skip`).

A score that is missing is NaN, between here and the advantages, and is never 0. Only failures of a call can be skipped:
an exception, or `ImagesFailed` for some of its images. A wrong shape or a number that is not finite is a mistake in the
reward, which always stops the run.

If a call with several images raises any other exception, the reward is called again for each of them alone. So one bad
image costs one image, and an exception that does not come again costs none.
"""

# B images of a micro-batch, F numbers that describe one image

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlcm_fast.faults import Fault
from rlcm_fast.rewards.base import ImagesFailed, ScoreError, one_line
from rlcm_fast.rewards.workers import Call
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Skipping:
    """Which rewards may fail for single images, and for which share of the images."""

    names: frozenset[str] = frozenset()
    share: float = 0.0  # rollout.max_skipped
    num_images: int = 1  # images that are scored together, over all processes

    def limit(self, num_images: int | None = None) -> int:
        """The number of images that may be skipped of `num_images`: the share, but at least one unless it is 0."""
        total = self.num_images if num_images is None else num_images
        return max(1, int(self.share * total)) if self.share > 0 else 0

    def check(self, num_skipped: int, num_images: int, place: str, problems: Sequence[str]) -> None:
        """Raises a Fault if too many images of all processes were skipped; every process must give the same numbers.

        place: where they were skipped, as "iteration 3"; problems: those that are known.
        """
        if num_skipped <= self.limit(num_images):
            return
        last = f", the last with {problems[-1]}" if problems else ""
        raise Fault(
            f"{place}: {num_skipped} of {num_images} images have no score{last}; rollout.max_skipped={self.share:g} "
            f"allows {self.limit(num_images)}: repair the reward, or raise rollout.max_skipped"
        ).of_all()


@dataclass(frozen=True)
class Answer:
    """What a reward answered for a micro-batch: unchecked scores or descriptions, and what failed, by image."""

    raw_scores: object  # a row for each image without a problem; None if there is no such image
    problems: Mapping[int, str] = field(default_factory=dict)

    def scored(self, num_images: int) -> list[int]:
        """The images that have a score, of `num_images`."""
        return [index for index in range(num_images) if index not in self.problems]


class Tally:
    """Counts the failures of each reward since the last `clear`; worker threads share it."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, reward_name: str, problem: str, index: int) -> None:
        """Notes a failure; raises ScoreError beyond the limit, so that nobody pays for calls that come to nothing."""
        with self._lock:
            self._counts[reward_name] += 1
            count = self._counts[reward_name]
        if count > self._limit:
            raise ScoreError(
                f"failed for {count} images, the last with {problem}; rollout.max_skipped allows {self._limit}: repair "
                "the reward, or raise rollout.max_skipped",
                index,
            )

    def clear(self) -> None:
        with self._lock:
            self._counts.clear()


Score = Callable[[Tensor, Sequence[Prompt]], object]


def answer_with_skips(call: Call, score: Score, images: Tensor, tally: Tally) -> Answer:
    """Scores images (B, 3, H, W) by a reward with on_failure=skip; `score` calls the reward.

    Raises ScoreError for mistakes of the reward, and for more failures than `tally` allows.
    """
    answer = _attempt(score, images, call.prompts)
    if answer.raw_scores is None and len(images) > 1 and set(answer.problems) == {0}:
        return _one_by_one(call, score, images, tally)
    for index, problem in answer.problems.items():
        tally.add(call.reward_name, problem, index)
    return answer


def _one_by_one(call: Call, score: Score, images: Tensor, tally: Tally) -> Answer:
    """Finds out which images fail, by a call for each."""
    rows, problems = [], {}
    for index, prompt in enumerate(call.prompts):
        call.begins(prompt)
        answer = _attempt(score, images[index : index + 1], [prompt])
        if answer.problems:
            problems[index] = answer.problems[0]
            tally.add(call.reward_name, problems[index], index)
        else:
            rows.append(answer.raw_scores)
    if not rows:
        return Answer(None, problems)
    try:
        return Answer(torch.cat(rows), problems)
    except (TypeError, RuntimeError) as error:  # no tensors, or of unlike shapes
        raise ScoreError(f"returned {type(rows[0]).__name__} for one image: {one_line(error)}") from error


def _attempt(score: Score, images: Tensor, prompts: Sequence[Prompt]) -> Answer:
    """Calls the reward once; an exception becomes the problem of image 0 and leaves no scores.

    It is kept as text, because its traceback would keep the images.
    """
    try:
        return Answer(score(images, prompts))
    except ImagesFailed as failed:
        return _partial(failed, len(images))
    except ScoreError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever a reward raises is its failure
        return Answer(None, {0: f"{type(error).__name__}: {one_line(error)}"})


def _partial(failed: ImagesFailed, num_images: int) -> Answer:
    """The answer of a reward that named the images it failed for."""
    strange = [index for index in failed.problems if index not in range(num_images)]
    if strange or not failed.problems:
        raise ScoreError(
            f"raised ImagesFailed for images {strange} of {num_images}; give indices of images that failed"
        )
    answer = Answer(None, dict(failed.problems))
    scored = answer.scored(num_images)
    if not scored:
        return answer
    if not isinstance(failed.scores, Tensor) or len(failed.scores) != num_images:
        raise ScoreError(
            f"raised ImagesFailed without a score for each of its {num_images} images; give one, of any value where it "
            "failed"
        )
    return Answer(failed.scores[scored], answer.problems)
