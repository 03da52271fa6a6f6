"""Refuses pictures that claim far more pixels than a picture has: a small file could fill the memory.

An EPS file is a program, for which Pillow would start Ghostscript; here it is no picture.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import EpsImagePlugin, Image

EpsImagePlugin.gs_binary = False


@contextmanager
def bombs_are_errors() -> Iterator[None]:
    """Within the block, Pillow raises for a picture beyond its limit of 89 million pixels, where it would only warn.

    Raises:
        Image.DecompressionBombError: the picture is larger.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", module=r"PIL\.TiffImagePlugin")  # of EXIF data that are damaged
        try:
            yield
        except Image.DecompressionBombWarning as error:
            raise Image.DecompressionBombError(" ".join(str(error).split())) from error
