"""Parses `pretraining.data`, the source of pairs, without a look at the data.

shapes:all                   the renderer of ShapesWorld, endless: a name of BUILT_IN
package.module:function      a function of yours, endless: called with a number, it returns (PIL.Image, str) and always
                             the same pair for that number
photos/                      a folder of images with metadata.jsonl (file_name, text: Hugging Face's imagefolder),
                             or with NAME.txt beside each NAME.jpg; all its folders, as train/ and test/, are read
pairs.jsonl                  one object per line: {"image": "cats/1.jpg", "text": "a cat"}, image relative to the file
shards/{000..099}.tar        webdataset shards, with braces and globs: NAME.jpg and NAME.txt, or a caption in NAME.json
hf:PATH?split=train&image=image&text=text&name=CONFIG
                             a Hugging Face dataset, streamed: a hub id or a folder; you may leave out what follows ?
"""

from __future__ import annotations

import glob
import os
import re
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl

from rlcm_fast.config.files import local_path

FIELD = "pretraining.data"
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # datasets' imagefolder reads all three

# Plug-in strings and no imports, because rooms of floor 2 must not import each other.
BUILT_IN = {
    "shapes:one": "rlcm_fast.shapes.pairs:one_shape",
    "shapes:two": "rlcm_fast.shapes.pairs:two_shapes",
    "shapes:neutral": "rlcm_fast.shapes.pairs:neutral",
    "shapes:all": "rlcm_fast.shapes.pairs:all_scenes",
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_BRACES = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Source:
    """The parsed value of `pretraining.data`."""

    text: str  # the value as written in the config
    kind: Literal["function", "imagefolder", "captioned_files", "jsonl", "webdataset", "hub"]
    path: str  # the name of a function, a folder, a file, a pattern or a hub id
    image: str = "image"  # the column of images
    caption: str = "text"  # the column of captions
    split: str = "train"
    name: str | None = None  # the configuration of a hub dataset


def parse_source(data: str) -> Source:
    """The source that `data` names; raises ValueError with the way out if it names none."""
    if data.startswith("hf:"):
        return _parse_hub(data)
    path = local_path(data)
    if data.lower().endswith(".tar"):
        return Source(data, "webdataset", str(path))
    if data.lower().endswith(".jsonl"):
        return Source(data, "jsonl", str(path))
    if data in BUILT_IN or (":" in data and not data.startswith("shapes:")):
        return Source(data, "function", data)
    if path.is_dir():
        return Source(data, "imagefolder" if metadata_files(path) else "captioned_files", str(path))
    raise ValueError(
        f"{FIELD}={data} is no source of images under {Path.cwd()}; give a folder of images, a .jsonl file, .tar"
        f" shards, hf:PATH, package.module:function or one of {', '.join(BUILT_IN)}"
    )


def metadata_files(folder: Path) -> list[Path]:
    """The metadata files of an imagefolder, which lie in it or, as in train/ and test/, one folder deeper."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir() and not _is_hidden(path, folder))]
    candidates = [place / name for place in folders for name in METADATA]
    return [path for path in candidates if path.is_file()]


def captioned_files(source: Source) -> list[tuple[str, str]]:
    """The (image, caption file) of every NAME.jpg and NAME.txt, sorted by name; at least one.

    Only regular files count, because opening a pipe would wait for ever, and no hidden ones: macOS writes ._NAME.jpg
    beside NAME.jpg. Raises ValueError if there is no image, or if an image has no caption file.
    """
    # Look once at everything in the folder.
    folder = Path(source.path)
    endings = (*IMAGE_ENDINGS, ".txt")
    candidates = (path for path in folder.rglob("*") if path.suffix.lower() in endings)
    files = {path for path in candidates if not _is_hidden(path, folder) and path.is_file()}

    # Every image has a caption.
    images = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    found = sorted((str(image), str(image.with_suffix(".txt"))) for image in images)
    lacking = next((image for image, caption in found if Path(caption) not in files), None)
    remedy = "write metadata.jsonl with file_name and text, or NAME.txt beside each NAME.jpg"
    if not found:
        raise ValueError(f"{FIELD}={source.text} holds no {', '.join(IMAGE_ENDINGS)}; {remedy}")
    if lacking:
        raise ValueError(f"{FIELD}={source.text}: {lacking} has no caption; {remedy}")
    return found


def _is_hidden(path: Path, folder: Path) -> bool:
    """Whether a name between `folder` and the end of `path` begins with a dot, or is a folder that macOS makes."""
    return any(name.startswith(".") or name == "__MACOSX" for name in path.relative_to(folder).parts)


def shards(source: Source) -> list[str]:
    """The .tar files of the pattern, sorted by name; only regular files count.

    Raises ValueError unless every expansion of its braces matches at least one file.
    """
    found = {pattern: list(filter(os.path.isfile, glob.glob(pattern))) for pattern in _expand(source.path)}
    lacking = [pattern for pattern, files in found.items() if not files]
    if len(lacking) == len(found):
        raise ValueError(f"{FIELD}={source.text} matches no .tar file under {Path.cwd()}; check the path")
    if lacking:
        first = ", ".join(lacking[:3]) + (", ..." if len(lacking) > 3 else "")
        raise ValueError(
            f"{FIELD}={source.text} lacks {len(lacking)} of {len(found)}: {first}; add them, or name fewer"
        )
    return sorted(set(chain.from_iterable(found.values())))


def _expand(pattern: str) -> list[str]:
    """Expand the braces of a{0,1}.tar and a{00..11}.tar as a shell does."""
    braces = _BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, dots, last = braces[1].partition("..")
    choices = braces[1].split(",")
    if dots and first.isdigit() and last.isdigit():
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [text for choice in choices for text in _expand(head + choice + tail)]


def _parse_hub(data: str) -> Source:
    path, _, query = data.removeprefix("hf:").partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = next((key for key in options if key not in ("split", "image", "text", "name")), None)
    if unknown is not None:
        raise ValueError(f"{FIELD}={data} sets {unknown}; after ? write split, image, text or name, joined by &")
    if not path or not (is_local(path) or _HUB_ID.fullmatch(path)):
        raise ValueError(f"{FIELD}={data} names no dataset; write hf:owner/name or hf:./folder")
    defaults = {"image": "image", "text": "text", "split": "train"} | options
    return Source(data, "hub", path, defaults["image"], defaults["text"], defaults["split"], options.get("name"))


def is_local(path: str) -> bool:
    """Whether a path after hf: is on this machine, and not a hub id."""
    return path.startswith((".", "/", "~")) or Path(path).exists()
