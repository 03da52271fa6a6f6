"""Gives files of the safetensors library the mode of any other file: version 0.8 lets their owner alone read them.

So a web server, a colleague or ComfyUI under another account could not open what a run wrote.
"""

from __future__ import annotations

import os
from pathlib import Path

_UMASK = os.umask(0o077)  # there is no way to read it alone
os.umask(_UMASK)


def share(place: str | Path) -> None:
    """Gives a safetensors file, or those in a folder and below, the mode that the umask says."""
    place = Path(place)
    for file in place.rglob("*.safetensors") if place.is_dir() else (place,):
        file.chmod(0o666 & ~_UMASK)
