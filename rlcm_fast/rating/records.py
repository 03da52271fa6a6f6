"""The file of all ratings, ratings.jsonl: a line for each answer of a person, appended and flushed to the disk at once.

    {"id": "000012/3", "round": 12, "kind": "ranking", "prompt": "a fox", "task": "default",
     "images": ["ratings/000012/006.png", "ratings/000012/007.png"], "ranks": [2, 1], "seconds": 3.1, "time": "..."}

`images` are relative to the file's folder. `ranks` is null for a prompt that was skipped. A line with `"undone": true`
takes back the line with its id, which may then come again: the last line of an id counts. A `comparison` shows an image
of the tuned model (first) and one of the start model (second), of one prompt and one seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from rlcm_fast.finite_json import load_json
from rlcm_fast.rating.ranks import check_ranks

Kind = Literal["ranking", "comparison"]


@dataclass(frozen=True)
class Rating:
    """A person's answer about the images of one prompt."""

    id: str
    round: int  # the iteration; tasks that take turns have their rounds of an iteration under one number
    kind: Kind
    prompt: str
    task: str
    images: tuple[str, ...]  # files, relative to the folder of the ratings
    ranks: tuple[int, ...] | None  # 1 is best, equal numbers tie; None if the prompt was skipped
    seconds: float  # that the person took
    time: str  # ISO 8601, UTC


class Journal:
    """The file, open for appending; `answers` holds what counts of it."""

    def __init__(self, file: Path) -> None:
        """Reads what is there; raises ValueError for a line that is no rating."""
        self.file = file
        self.answers: dict[str, Rating] = {rating.id: rating for rating in read_ratings(file)} if file.exists() else {}

    def add(self, rating: Rating) -> None:
        """Appends an answer; raises OSError, and records nothing, if the disk is full."""
        self._append(asdict(rating))
        self.answers[rating.id] = rating

    def undo(self, id_: str) -> None:
        """Takes back the answer with this id; raises OSError as `add` does."""
        self._append({"id": id_, "undone": True, "time": now()})
        del self.answers[id_]

    def _append(self, entry: Mapping[str, Any]) -> None:
        # A run that was killed while it wrote has left a line without its end; a line that failed is cut off again.
        with self.file.open("ab") as lines:
            size = lines.tell()
            text = json.dumps(entry) + "\n"
            if size and not _ends_a_line(self.file):
                text = "\n" + text
            try:
                lines.write(text.encode())
                lines.flush()
                os.fsync(lines.fileno())
            except OSError:
                os.truncate(self.file, size)
                raise


def _ends_a_line(file: Path) -> bool:
    with file.open("rb") as content:
        content.seek(-1, os.SEEK_END)
        return content.read(1) == b"\n"


def now() -> str:
    """Returns the time for a line."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def read_ratings(file: Path) -> list[Rating]:
    """Returns the ratings that count: the last of each id, without those that were undone.

    Raises:
        ValueError: there is no such file, or one of its lines is no rating; a last line without an end is forgiven.
    """
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"file={file} cannot be read ({error.strerror}); give the ratings.jsonl of a run") from error
    found: dict[str, Rating] = {}
    lines = text.split("\n")  # the last is what follows the last line's end: nothing, or half a line
    for number, line in enumerate(lines, start=1):
        entry = _entry(line)
        if entry is None:
            is_torn = number >= len(lines) or _is_torn(line)
            if line.strip() and not is_torn:
                raise ValueError(f"file={file} line {number} is no JSON object; delete the line, or give another file")
            continue
        if entry.get("undone"):
            found.pop(str(entry.get("id")), None)
            continue
        try:
            rating = _rating(entry)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"file={file} line {number} {missing}; delete the line, or give another file") from error
        found.pop(rating.id, None)
        found[rating.id] = rating
    return list(found.values())


def _is_torn(line: str) -> bool:
    """Tells whether a line is the beginning of one of ours, cut off by a kill or a power cut."""
    return (line.startswith('{"id": ') and not line.endswith("}")) or not line.strip("\x00 ")


def _entry(line: str) -> dict[str, Any] | None:
    try:
        entry = load_json(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) else None


def _rating(entry: Mapping[str, Any]) -> Rating:
    images = tuple(str(image) for image in entry["images"])
    ranks = entry["ranks"]
    if ranks is not None:
        check_ranks(ranks, len(images))
    if entry["kind"] not in ("ranking", "comparison"):
        raise ValueError(f"kind={entry['kind']} is neither ranking nor comparison")
    return Rating(
        id=str(entry["id"]),
        round=int(entry["round"]),
        kind=cast(Kind, entry["kind"]),
        prompt=str(entry["prompt"]),
        task=str(entry.get("task", "default")),
        images=images,
        ranks=None if ranks is None else tuple(ranks),
        seconds=float(entry.get("seconds", 0.0)),
        time=str(entry.get("time", "")),
    )
