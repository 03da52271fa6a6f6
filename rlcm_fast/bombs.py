"""Refuses pictures that claim far more pixels than a picture has: a small file could fill the memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image


@contextmanager
def bombs_are_errors() -> Iterator[None]:
    """Within the block, Pillow raises for a picture beyond its limit of 89 million pixels, where it would only warn.

    Raises:
        Image.DecompressionBombError: the picture is larger.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield
        except Image.DecompressionBombWarning as error:
            raise Image.DecompressionBombError(" ".join(str(error).split())) from error
