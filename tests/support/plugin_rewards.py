"""Rewards as a user would plug them in: one that works, and those that go wrong on command."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rlcm_fast import parallel, plug_in
from rlcm_fast.run_folder import checkpoint
from rlcm_fast.trajectory import Prompt


class Brightness:
    """Mean of all pixels, times a factor so that it spreads as rewards do."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return 10 * images.flatten(1).mean(dim=1)


class LastDigits(Brightness):
    """Sees in an image's brightness what nobody sees: the digits that float16 rounds."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return (1e5 * images.flatten(1).mean(dim=1)) % 1


class Slow(Brightness):
    """Takes its time, so that a signal can be timed."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self._seconds)
        return super().__call__(images, prompts)


class Faulty(Brightness):
    """Works `good_calls` times, then answers with a fault: nan, inf, shape or exception."""

    def __init__(self, fault: str, good_calls: int) -> None:
        self._fault = fault
        self._calls_left = good_calls

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        values = super().__call__(images, prompts)
        self._calls_left -= 1
        if self._calls_left >= 0:
            return values
        if self._fault == "exception":
            raise OSError("the reward model is gone")
        if self._fault == "shape":
            return values[:, None]
        values[1] = {"nan": torch.nan, "inf": torch.inf}[self._fault]
        return values


class Unreachable(Brightness):
    """Cannot score an image of call number `call`, in which it has several, nor that image alone in the next call."""

    def __init__(self, call: int) -> None:
        self._calls_left = call

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if len(images) > 1:
            self._calls_left -= 1
        if self._calls_left in (-1, -2):
            self._calls_left -= 1
            raise ConnectionError("no answer")
        return super().__call__(images, prompts)


class DiesOnRank1(Brightness):
    """As if the machine of rank 1 lost power at call number `call`."""

    def __init__(self, call: int) -> None:
        self._calls_left = call

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self._calls_left -= 1
        if self._calls_left < 0 and parallel.rank() == 1:
            os._exit(9)
        return super().__call__(images, prompts)


class KilledWhileSaving(Brightness):
    """Has the process killed in the middle of its first checkpoint: its shards are written, the rest is not."""

    def __init__(self) -> None:
        def kill(*_: object) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        checkpoint.write_tensors = kill


@plug_in
class Quadrants:
    """A classifier of four classes, each likelier the brighter its quarter of the image is."""

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1), 2).flatten(1).mul(10).softmax(dim=1)
