"""Scores the images of several clients by one reward: those that wait together share a batch.

    submit(pixels, prompt) -> Future[Outcome]       from any thread
    one thread: takes the first waiting image and those of its size, up to batch_size, and scores them

Nothing waits for a batch to become full: while the reward scores one batch, the next gathers. If a batch raises, its
images are scored one by one, so that an image which no reward can score fails alone.
"""

# B images of H x W pixels

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import torch

from rlcm_fast.rewards.base import ImagesFailed, Reward, ScoreError, expect, one_line
from rlcm_fast.rewards.encoding import from_pixels
from rlcm_fast.rewards.outcomes import Failed, Outcome
from rlcm_fast.rewards.unchanged import Watch
from rlcm_fast.trajectory import Prompt


class Busy(Exception):
    """So many images wait already that no more are taken."""


@dataclass
class Counts:
    """What a batcher has done since it began."""

    images: int = 0
    failed_images: int = 0
    batches: int = 0
    scoring_seconds: float = 0.0


@dataclass(frozen=True)
class _Item:
    pixels: np.ndarray  # (H, W, 3) uint8
    prompt: Prompt
    outcome: Future[Outcome] = field(default_factory=Future)


class Batcher:
    """A reward in a thread of its own; `close` ends it."""

    def __init__(self, reward: Reward, device: torch.device, batch_size: int, most_waiting: int) -> None:
        """The images are handed to the reward on `device`, at most `batch_size` at once."""
        self.counts = Counts()
        self._reward, self._device = reward, device
        self._batch_size, self._most_waiting = batch_size, most_waiting
        self._waiting: deque[_Item] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, name="reward_server", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of images that no batch has taken yet."""
        return len(self._waiting)

    def submit(self, pixels: Sequence[np.ndarray], prompts: Sequence[Prompt]) -> list[Future[Outcome]]:
        """Queues images (H, W, 3) uint8 with a prompt each; raises Busy, and takes none, if too many wait."""
        items = [_Item(image, prompt) for image, prompt in zip(pixels, prompts, strict=True)]
        with self._changed:
            if self._is_closed or len(self._waiting) + len(items) > self._most_waiting:
                raise Busy(f"{len(self._waiting)} images wait")
            self._waiting.extend(items)
            self._changed.notify()
        return [item.outcome for item in items]

    def close(self) -> None:
        """Scores what waits, takes no more, and ends the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def _serve(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while batch := self._next_batch():
            start = time.perf_counter()
            outcomes = self._score(batch)
            self.counts.scoring_seconds += time.perf_counter() - start
            self.counts.batches += 1
            self.counts.images += len(batch)
            self.counts.failed_images += sum(isinstance(outcome, Failed) for outcome in outcomes)
            for item, outcome in zip(batch, outcomes, strict=True):
                item.outcome.set_result(outcome)

    def _next_batch(self) -> list[_Item]:
        """Waits for images and takes a batch of one size; empty when it is closed and nothing waits."""
        batch: list[_Item] = []
        while not batch:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._is_closed)
                if not self._waiting:
                    return []
                shape = self._waiting[0].pixels.shape
                alike = [item for item in self._waiting if item.pixels.shape == shape][: self._batch_size]
                taken = {id(item) for item in alike}
                self._waiting = deque(item for item in self._waiting if id(item) not in taken)
            batch = [item for item in alike if item.outcome.set_running_or_notify_cancel()]  # its client may be gone
        return batch

    def _score(self, batch: Sequence[_Item]) -> list[Outcome]:
        images = from_pixels(np.stack([item.pixels for item in batch])).to(self._device)
        prompts = [item.prompt for item in batch]
        try:
            with torch.no_grad():
                watch = Watch(images)
                watch.begin()
                scores = expect(self._reward(images, prompts), (len(batch),), "one score per image")
                watch.check(lambda copy: self._reward(copy, prompts))
        except ImagesFailed as failed:
            return _partial(failed, len(batch))
        except Exception as error:  # noqa: BLE001 - whatever a reward raises fails its images, not the server
            if len(batch) > 1 and not isinstance(error, ScoreError):
                return [self._score([item])[0] for item in batch]
            return [Failed(f"{type(error).__name__}: {one_line(error)}")] * len(batch)
        return [_finite(score) for score in scores.tolist()]


def _finite(score: float) -> Outcome:
    return score if np.isfinite(score) else Failed(f"returned {score}; scores must be finite")


def _partial(failed: ImagesFailed, num_images: int) -> list[Outcome]:
    """The outcomes of a reward that named the images it failed for."""
    scores = [float("nan")] * num_images if failed.scores is None else failed.scores.tolist()
    return [
        Failed(failed.problems[index]) if index in failed.problems else _finite(score)
        for index, score in enumerate(scores)
    ]
