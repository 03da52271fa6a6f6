"""Sees whether a reward changes the images that it shares with the other rewards, and names the one that did.

An operation of torch in place raises the version of the tensor. On a CPU, numpy and PIL can write into the tensor's
memory without that, so there a checksum of the bytes is compared, too. Several rewards score the same images at once,
so whoever sees a change calls its own reward on a copy: only a reward that changes the copy as well is to blame.
"""

# B images of a micro-batch

from __future__ import annotations

import contextlib
import threading
import zlib
from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlcm_fast.rewards.base import ScoreError

_PROBLEM = (
    "changed its images in place, and so what other rewards see; work on a copy, such as images.clone() or "
    "images.numpy().copy()"
)


class Watch:
    """The images of a micro-batch (B, 3, H, W), and how they were before any reward saw them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images
        self._version = _version(images)
        self._lock = threading.Lock()
        self._checksum: int | None = None

    def begin(self) -> None:
        """Notes the bytes; call it before each reward. The first call counts."""
        with self._lock:
            if self._checksum is None:
                self._checksum = _checksum(self.images)

    def check(self, call: Callable[[Tensor], object]) -> None:
        """Raises ScoreError if the images have changed and `call`, of a reward that has seen them, is to blame."""
        if not self.is_changed():
            return
        probe = Watch(self.images.clone())
        probe.begin()
        with contextlib.suppress(Exception):  # only what it does to the copy matters
            call(probe.images)
        if probe.is_changed():
            raise ScoreError(_PROBLEM)

    def is_changed(self) -> bool:
        """Tells whether the images are not as they were."""
        return _version(self.images) != self._version or _checksum(self.images) != self._checksum


def _version(images: Tensor) -> int:
    return 0 if images.is_inference() else images._version  # inference tensors have none


def _checksum(images: Tensor) -> int:
    """A checksum of the bytes of images on a CPU, 0.5 ms per MiB; 0 elsewhere, where numpy works on a copy."""
    if images.device.type != "cpu":
        return 0
    data: Any = images.detach().contiguous().numpy()
    return zlib.crc32(data)
