"""Turns what libraries raise about unreadable data into one line that names the line or shard and the way out."""

from __future__ import annotations

import json
import lzma
import pickle
import struct
import tarfile
import zlib
from itertools import islice
from pathlib import Path

from rlcm_fast.faults import Fault
from rlcm_fast.pairs.sources import FIELD, METADATA, Source, metadata_files, shards

_REMEDIES = {
    "imagefolder": 'give each image its file_name and text, as {"file_name": "a/1.jpg", "text": "a cat"}',
    "jsonl": 'write {"image": "a/1.jpg", "text": "a cat"}',
    "webdataset": "make the shard again, or take it out",
    "hub": "check its name, what follows ? and, for hf:owner/name, the network",
}

_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PK\x03\x04")  # gzip, bzip2, xz, zstd, zip


class PairsFault(Fault):
    """Pairs cannot be read while the run trains; the message is one line that names the way out."""


def reading_errors() -> tuple[type[Exception], ...]:
    """The errors that datasets and the libraries below it raise if files are missing, broken or out of reach."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    of_archives = (tarfile.TarError, zlib.error, lzma.LZMAError, struct.error, EOFError)
    of_content = (ValueError, LookupError, TypeError, RuntimeError, pickle.PickleError, pyarrow.ArrowException)
    return (OSError, DatasetsError, *of_archives, *of_content)


def unreadable(source: Source, error: Exception) -> ValueError:
    """Describe `error` in one line; searches all of the data for the place."""
    problem = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    if source.kind == "webdataset":
        shard = next(filter(_breaks_off, shards(source)), None)
        problem = f"{shard} {problem}" if shard else problem
    else:
        problem = bad_line(source) or problem
    return ValueError(f"{FIELD}={source.text}: {problem}; {_REMEDIES[source.kind]}")


def check_lines(source: Source, limit: int) -> None:
    """Raise ValueError if one of the first `limit` lines of a .jsonl file is no pair."""
    fault = bad_line(source, limit)
    if fault:
        raise ValueError(f"{FIELD}={source.text}: {fault}; {_REMEDIES[source.kind]}")


def bad_line(source: Source, limit: int | None = None) -> str | None:
    """A description of the first line of the source's .jsonl file that is no pair.

    None if every line is a pair (checking `limit` lines, or all), or if there is no such file.
    """
    if source.kind == "imagefolder":
        files, keys = [path for path in metadata_files(Path(source.path)) if path.name == METADATA[0]], {"text"}
    elif source.kind == "jsonl":
        files, keys = [Path(source.path)], {"image", "text"}
    else:
        return None
    faults = (_bad_line_of(path, keys, limit) for path in files)
    return next((fault for fault in faults if fault), None)


def _bad_line_of(path: Path, keys: set[str], limit: int | None) -> str | None:
    line = b""
    with path.open("rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(filled, limit):
            if not _is_object(line, keys):
                return f"line {number} of {path.name} is {line.decode(errors='backslashreplace').strip()[:200]!r}"
    return None if line else f"{path.name} is empty"


def check_archives(source: Source, most_members: int) -> None:
    """Raise ValueError for shards that are compressed, or hold compressed members: a small file may fill the memory.

    Looks at the first bytes of every shard, and at the first members of the first one.
    """
    files = shards(source)
    packed = next((file for file in files if _is_compressed(file)), None)
    if packed:
        raise ValueError(f"{FIELD}={source.text}: {packed} is compressed; unpack it to a plain .tar once, with gunzip")
    try:
        with tarfile.open(files[0], "r:") as tar:
            names = [member.name for member in islice(tar, most_members)]
    except (tarfile.TarError, OSError, ValueError):  # reading it says what is wrong
        return
    inside = next((name for name in names if name.lower().endswith(_COMPRESSED)), None)
    if inside:
        raise ValueError(f"{FIELD}={source.text}: {inside} of {files[0]} is compressed; {_REMEDIES['webdataset']}")


def _is_compressed(file: str) -> bool:
    with open(file, "rb") as content:
        return content.read(6).startswith(_MAGIC)


def _is_object(line: bytes, keys: set[str]) -> bool:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or brackets without an end
        return False
    if not isinstance(record, dict) or not keys <= record.keys():
        return False
    return all(isinstance(record[key], str | None) for key in keys)


def _breaks_off(shard: str) -> bool:
    """Whether a .tar file ends early; reads its headers and skips what lies between."""
    try:
        with tarfile.open(shard) as tar:
            return not tar.getmembers()
    except tarfile.TarError:
        return True
