"""Finds the YAML file that `--config` means, and the files that a YAML file means.

--config my.yaml                 a path, from the current folder
--config shapes/compressibility  a config that ships with rlcm_fast, from any folder; a path that exists wins
source: animals.txt              in a YAML file: the file beside it, or else the file in the current folder
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from pathlib import Path
from typing import Annotated

# The first line of every config that we write. A run's config.yaml must mean the same files as the command that started
# the run, and not files beside it in the run's folder.
RESOLVED = "# Written by rlcm_fast. Relative paths begin at the folder that a command runs in, not at this file's."

_SHIPPED = (Path(__file__).parent.parent / "configs").resolve()  # in a checkout a symbolic link to ../configs
_BRACES = re.compile(r"\{[^{}]*\}")


class MayBeFile:
    """Marks a field whose text may name a file; in a YAML file, the name may be relative to the YAML file."""


Source = Annotated[str, MayBeFile()]  # shapes:one, hf:PATH, package.module:function, or a file, a folder, a pattern


MOST_BYTES, MOST_OF_A_PATH = 255, 4096  # of file systems


def check_name(named: str, text: str) -> None:
    """Refuses a text that no file, model or module can be called; raises ValueError that begins with `named`."""
    check_text(named, text)
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > MOST_BYTES or len(text) > MOST_OF_A_PATH:
        raise ValueError(
            f"{named}={text[:40]}... has a name of {longest} bytes; give a shorter one: a name has {MOST_BYTES} bytes "
            f"at most, and a path {MOST_OF_A_PATH}"
        )
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise ValueError(f"{named}={text!r} has a character that cannot be seen; leave it out")


def is_text(text: str) -> bool:
    """Tells whether every character can be written: Python has half of a surrogate pair for a byte that is no UTF-8."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def check_text(named: str, text: str) -> None:
    """Refuses a text that no tokenizer and no file takes; raises ValueError that begins with `named`."""
    if not is_text(text):
        raise ValueError(f"{named}={text!r} has bytes that are no UTF-8 text; write it anew")


def find_config(name: str) -> Path:
    """Returns the YAML file of a path or of a shipped config's name; raises ValueError if there is neither."""
    if os.path.isfile(name):  # unlike Path.is_file, it takes names that no file can have
        return Path(name)
    shipped = shipped_configs()
    known = name.removesuffix(".yaml")
    if known in shipped:
        return shipped[known]
    if os.path.isdir(name):
        raise ValueError(f"config={name} is a folder; give a YAML file in it")
    near = _closest(known.removeprefix("configs/"), list(shipped))
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(
        f"config={name} is not a file; give the path of a YAML file, or the name of a config that ships: {hint}"
        "`rlcm-fast configs` lists them"
    )


def shipped_configs() -> dict[str, Path]:
    """Returns the files of the shipped configs, by name, as shapes/compressibility."""
    files = sorted(_SHIPPED.glob("*/*.yaml"))
    return {file.relative_to(_SHIPPED).with_suffix("").as_posix(): file for file in files}


def summary_of(file: Path) -> str:
    """Returns what a config is for: the first sentence of its first line, which is a comment."""
    with file.open(encoding="utf-8") as lines:
        sentence, period, _ = lines.readline().removeprefix("#").strip().partition(". ")
    return sentence + period.strip()


def beside(folder: Path, text: str) -> str:
    """Returns the path of what `text` names in `folder`, that of a YAML file; the text itself if nothing is there.

    Names with a colon (shapes:one, hf:PATH, package.module:function) are not paths. Shards of pairs may be a pattern
    with braces and globs; it is there if anything matches it.
    """
    if not text or ":" in text or os.path.isabs(os.path.expanduser(text)):
        return text
    path = os.path.normpath(folder / text)
    return path if os.path.exists(path) or _matches(folder, text) else text


def check_can_be_made(folder: str, field: str) -> None:
    """Raises ValueError if a folder is a file, or cannot be made or written in; makes nothing."""
    # Find the nearest place that is there.
    named, place = f"{field}={folder}", Path(os.path.abspath(folder))
    if not folder.strip():
        raise ValueError(f"{named} is empty; give a folder, . for this one")
    try:
        while not os.path.lexists(place):
            place = place.parent
        is_folder = place.is_dir()
    except (OSError, ValueError) as error:  # too long a name, or a null character in it
        raise ValueError(f"{named} can be no folder ({error}); give another") from error

    # Folders can only be made in a folder that may be written in; a name may have 255 bytes on most file systems.
    if not is_folder:
        raise ValueError(f"{named} cannot be made: {place} is no folder; give another")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{named} cannot be written: {place} allows nobody or others to write; give another")
    if any(len(os.fsencode(part)) > 255 for part in Path(folder).parts):
        raise ValueError(f"{named} has a name of more than 255 bytes; give a shorter one")


def _matches(folder: Path, pattern: str) -> bool:
    return pattern.endswith(".tar") and bool(glob.glob(_BRACES.sub("*", pattern), root_dir=folder))


def _closest(name: str, shipped: list[str]) -> list[str]:
    """Returns up to two similar names: the name itself, names with the same last part, or names that look alike."""
    same = [other for other in shipped if other.rpartition("/")[2] == name.rpartition("/")[2]]
    return [name] if name in shipped else same[:2] or difflib.get_close_matches(name, shipped, n=2)


def local_path(text: str) -> Path:
    """Returns the path with a leading ~ as the home folder; `~NAME` of an unknown user stays as it is written."""
    return Path(os.path.expanduser(text))
