"""The checks of `rlcm-fast check-reward`: each looks at one promise of the reward protocol (rewards/base.py).

ok      the promise is kept
note    worth knowing; training works
FAILED  the promise is broken: do not train on the reward
"""

# B pictures, F numbers that describe one

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import psutil
import torch
from torch import Tensor

from rlcm_fast.cli.scoring import raw_scores, raw_scores_at_once
from rlcm_fast.config import RewardConfig
from rlcm_fast.faults import Fault
from rlcm_fast.rewards import GroupReward, PersonReward, Reward, grouped, make_placed
from rlcm_fast.trajectory import Prompt

_GIB = 2**30
SAME = 1e-5
"""Largest difference of two runs on the same pictures, relative to 1 + |score|: kernels may add in another order."""
ALIKE = 1e-3
"""Largest difference between a batch and its pictures one by one, relative to 1 + |score|; bf16 may exceed it."""


class Verdict(Enum):
    """What came out of a check."""

    OK = "ok"
    NOTE = "note"
    FAILED = "FAILED"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check, in words, with its numbers for programs."""

    what: str
    verdict: Verdict
    words: str
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pictures:
    """What the reward is tried on."""

    images: Tensor  # (B, 3, H, W) float32 in [0, 1]
    prompts: Sequence[Prompt]
    names: Sequence[str]


def findings_of(config: RewardConfig, pictures: Pictures) -> list[Finding]:
    """Builds the reward and checks it; the checks stop at a first score that fails, since the rest would too.

    Nobody is asked for a reward that a person gives. Raises ValueError if the reward cannot be built, or could not ask.
    """
    # Build it.
    reward, built = _build(config, pictures.images.device)
    if isinstance(reward, PersonReward):
        return [built, Finding("asks a person", Verdict.OK, f"{reward.asking.readiness()}; nobody was asked")]

    # Score once; everything else compares with this.
    before = pictures.images.clone()
    try:
        scores = raw_scores(config.name, reward, pictures.images, pictures.prompts)
    except Fault as error:
        what = "finite scores" if torch.equal(before, pictures.images) else "unchanged images"
        return [built, Finding(what, Verdict.FAILED, str(error))]
    subject = Subject(config.name, reward, pictures, scores)
    unchanged = Finding("unchanged images", Verdict.OK, "the reward leaves them alone")

    # Check the promises; a reward that fails at one of them fails that check alone.
    findings = [built, subject.scores_found(), unchanged]
    checks = {
        "repeatable": subject.repeatable,
        "two calls at once": subject.two_at_once,
        "one by one": subject.one_by_one,
        "time": subject.time,
    }
    for what, check in checks.items():
        try:
            findings.append(check())
        except Fault as error:
            findings.append(Finding(what, Verdict.FAILED, str(error)))
    return [*findings, subject.gradient()]


def _build(config: RewardConfig, device: torch.device) -> tuple[Reward, Finding]:
    """The reward, and what building it cost."""
    before, gpu_before, start = _resident(), _allocated(device), time.perf_counter()
    reward = grouped(config.name, make_placed(config), config.group_size, config.credit)
    seconds = time.perf_counter() - start
    memory, gpu = (_resident() - before) / _GIB, (_allocated(device) - gpu_before) / _GIB
    words = f"in {seconds:.2g} s; {memory:.2f} GiB of memory" + (f", {gpu:.2f} GiB of the GPU" if gpu > 0 else "")
    numbers = {"seconds": seconds, "memory_gib": memory, "gpu_gib": gpu}
    return reward, Finding("builds", Verdict.OK, words, numbers)


@dataclass(frozen=True)
class Subject:
    """A reward, and what it found in the pictures at the first call."""

    name: str
    reward: Reward
    pictures: Pictures
    scores: Tensor  # (B,), or (B, F) of a set reward

    def scores_found(self) -> Finding:
        """The scores; finite, or the first call would have failed."""
        if isinstance(self.reward, GroupReward):
            return self._value_found()
        scores = dict(zip(self.pictures.names, self.scores.tolist(), strict=True))
        words = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
        return Finding("finite scores", Verdict.OK, words, {"scores": scores})

    def _value_found(self) -> Finding:
        """The value of all pictures as one group of a set reward, and of each alone."""
        assert isinstance(self.reward, GroupReward)
        together = torch.arange(len(self.scores))[None]
        value = self.reward.values(self.scores, together).item()
        alone = self.reward.values(self.scores, together.T).tolist()
        words = f"{value:.4g} as one group, {min(alone):.4g} to {max(alone):.4g} alone"
        return Finding("finite values", Verdict.OK, words, {"value": value, "values_alone": alone})

    def repeatable(self) -> Finding:
        """Whether a second call gives the same scores, without which a resumed run differs."""
        again = raw_scores(self.name, self.reward, self.pictures.images, self.pictures.prompts)
        far = self._distance(again, self.scores)
        if far <= SAME:
            return Finding("repeatable", Verdict.OK, f"two calls differ by {far:.1g}", {"difference": far})
        words = f"two calls on the same pictures differ by {far:.2g}: scores must depend on the arguments alone"
        return Finding("repeatable", Verdict.FAILED, words, {"difference": far})

    def two_at_once(self) -> Finding:
        """Whether two threads get what one gets, as rollout.reward_workers above 1 needs."""
        images, prompts = self.pictures.images, list(self.pictures.prompts)
        turned = raw_scores(self.name, self.reward, images.flip(0), prompts[::-1])
        far = 0.0
        for _ in range(3):
            ours, theirs = raw_scores_at_once(
                self.name, self.reward, [(images, prompts), (images.flip(0), prompts[::-1])]
            )
            far = max(far, self._distance(ours, self.scores), self._distance(theirs, turned))
        if far <= SAME:
            words = f"agree with calls one after another to {far:.1g}"
            return Finding("two calls at once", Verdict.OK, words, {"difference": far})
        words = f"differ from calls one after another by {far:.2g}; it needs a lock, or rollout.reward_workers: 1"
        return Finding("two calls at once", Verdict.FAILED, words, {"difference": far})

    def one_by_one(self) -> Finding:
        """Whether a picture's score depends on the pictures that are scored with it."""
        images, prompts = self.pictures.images, self.pictures.prompts
        singles = [
            raw_scores(self.name, self.reward, images[row : row + 1], prompts[row : row + 1])
            for row in range(len(images))
        ]
        far = self._distance(torch.cat(singles), self.scores)
        if far <= ALIKE:
            return Finding("one by one", Verdict.OK, f"differs from a batch by {far:.1g}", {"difference": far})
        words = f"differs from a batch by {far:.2g}: a score depends on its neighbours, or the precision is low"
        return Finding("one by one", Verdict.NOTE, words, {"difference": far})

    def time(self) -> Finding:
        """Seconds per picture in a batch, the fastest of three calls, and the memory at its peak."""
        device = self.pictures.images.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            raw_scores(self.name, self.reward, self.pictures.images, self.pictures.prompts)  # ends with a copy
            seconds.append(time.perf_counter() - start)
        per_picture = min(seconds) / len(self.pictures.images)
        height, width = self.pictures.images.shape[2:]
        peak = torch.cuda.max_memory_allocated(device) / _GIB if device.type == "cuda" else _resident() / _GIB
        words = (
            f"{per_picture:.3g} s per picture of {width} x {height}, {len(self.pictures.images)} at once; "
            f"{peak:.2f} GiB in use by the process"
        )
        return Finding("time", Verdict.OK, words, {"seconds_per_picture": per_picture, "peak_gib": peak})

    def gradient(self) -> Finding:
        """Whether the score has a gradient; training here needs none."""
        images = self.pictures.images.clone().requires_grad_()
        call = self.reward.reward.describe if isinstance(self.reward, GroupReward) else self.reward
        try:
            with torch.enable_grad():
                scores = call(images, self.pictures.prompts)
                norm = torch.autograd.grad(scores.sum(), images)[0].norm().item()
        except Exception:  # noqa: BLE001 - whatever it raises, there is no gradient, and nothing here needs one
            return Finding("gradient", Verdict.OK, "none, and none is needed", {"gradient": None})
        return Finding("gradient", Verdict.OK, f"of norm {norm:.3g}; not used", {"gradient": norm})

    def _distance(self, scores: Tensor, others: Tensor) -> float:
        return ((scores - others).abs() / (1 + others.abs())).max().item()


def _resident() -> int:
    """The memory of this process, in bytes."""
    return psutil.Process().memory_info().rss


def _allocated(device: torch.device) -> int:
    """The memory that torch's tensors have on a GPU, in bytes."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
