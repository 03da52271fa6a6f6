"""Words what libraries raise about data that cannot be read: which line or shard it is, and the way out."""

from __future__ import annotations

import json
import tarfile
from itertools import islice
from pathlib import Path

from rlcm_fast.pairs.sources import FIELD, METADATA, Source, shards

_REMEDIES = {
    "imagefolder": 'give each image its file_name and text, as {"file_name": "a/1.jpg", "text": "a cat"}',
    "jsonl": 'write {"image": "a/1.jpg", "text": "a cat"}',
    "webdataset": "make the shard again, or take it out",
    "hub": "check its name, what follows ? and, for hf:owner/name, the network",
}


def reading_errors() -> tuple[type[Exception], ...]:
    """What datasets and the libraries below it raise of files that are missing, broken or out of reach."""
    import pyarrow
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, LookupError, tarfile.TarError, pyarrow.ArrowException, DatasetsError)


def unreadable(source: Source, error: Exception) -> ValueError:
    """`error` in one line; looks through all of the data for the place."""
    said = f"cannot be read ({type(error).__name__}: {' '.join(str(error).split())})"
    if source.kind == "webdataset":
        shard = next(filter(_breaks_off, shards(source)), None)
        said = f"{shard} {said}" if shard else said
    else:
        said = bad_line(source) or said
    return ValueError(f"{FIELD}={source.text}: {said}; {_REMEDIES[source.kind]}")


def check_lines(source: Source, limit: int) -> None:
    """Raises ValueError where one of the first lines of a .jsonl file is no pair."""
    fault = bad_line(source, limit)
    if fault:
        raise ValueError(f"{FIELD}={source.text}: {fault}; {_REMEDIES[source.kind]}")


def bad_line(source: Source, limit: int | None = None) -> str | None:
    """What the first line of the source's .jsonl file is that is no pair; None: there is none, or no such file."""
    path = Path(source.path) / METADATA[0] if source.kind == "imagefolder" else Path(source.path)
    if source.kind not in ("imagefolder", "jsonl") or not path.is_file():
        return None
    keys, line = {"text"} if source.kind == "imagefolder" else {"image", "text"}, b""
    with path.open("rb") as file:
        filled = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in islice(filled, limit):
            if not _is_object(line, keys):
                return f"line {number} of {path.name} is {line.decode(errors='backslashreplace').strip()[:200]!r}"
    return None if line else f"{path.name} is empty"


def _is_object(line: bytes, keys: set[str]) -> bool:
    try:
        record = json.loads(line)
    except ValueError:  # no JSON, or no UTF-8
        return False
    return isinstance(record, dict) and keys <= record.keys()


def _breaks_off(shard: str) -> bool:
    """Reads the headers of a .tar file and seeks over what lies between."""
    try:
        with tarfile.open(shard) as tar:
            return not tar.getmembers()
    except tarfile.TarError:
        return True
