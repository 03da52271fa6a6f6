"""Reads the pictures of a folder for the commands that score them."""

# H W pixels

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from rlcm_fast.bombs import bombs_are_errors
from rlcm_fast.config.files import local_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # pictures of two lenses (MPO) are JPEG, too


@dataclass(frozen=True)
class Picture:
    """A picture file whose header has been read."""

    path: Path
    size: tuple[int, int]  # height and width in pixels, as its camera held it


def find_pictures(folder: str, field: str = "images") -> list[Picture]:
    """The pictures of a folder in the order of their names, 2.png before 10.png; other files are left out.

    Raises ValueError if there is no such folder, if it has no picture, or if the header of one cannot be read.
    """
    place = local_path(folder)
    if not place.is_dir():
        raise ValueError(f"{field}={folder} is no folder; give a folder of {', '.join(SUFFIXES)} files")
    files = [path for path in place.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(f"{field}={folder} holds no picture; it needs {', '.join(SUFFIXES)} files, not in subfolders")
    return [open_picture(path, field) for path in sorted(files, key=_natural)]


def open_picture(path: Path, field: str) -> Picture:
    """Read the header of a picture; raises ValueError if it is none."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{field}={path} is no plain file; give a picture")
    try:
        with bombs_are_errors(), Image.open(path, formats=_FORMATS) as image:
            width, height = image.size
            is_turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's orientations that swap the sides
    except Exception as error:
        raise ValueError(_unreadable(path, field, error)) from error
    return Picture(path, (width, height) if is_turned else (height, width))


def read_picture(picture: Picture, field: str = "images") -> Tensor:
    """The pixels (3, H, W) float32 in [0, 1], turned as EXIF says; raises ValueError if they cannot be decoded."""
    try:
        with bombs_are_errors(), Image.open(picture.path, formats=_FORMATS) as image:
            pixels = np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        raise ValueError(_unreadable(picture.path, field, error)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _unreadable(path: Path, field: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{field}={path} cannot be read as a picture ({reason}); repair it, or remove it"


def _natural(path: Path) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by their value."""
    parts = re.split(r"(\d+)", path.name)
    return [(1, int(part), part) if part.isdecimal() else (0, 0, part) for part in parts]
