"""Reads prompts from files of any size: an index keeps where each line starts, and a line is read when it is needed.

Indexing reads the file once, in blocks. It keeps 4 bytes per line (8 from 4 GiB on) and a checksum of the content.
Every access opens the file anew, so processes share nothing. It refuses a file that has changed since it was indexed.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from rlcm_fast.config.files import is_text
from rlcm_fast.trajectory import Prompt

_BLOCK_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
MOST_OF_A_LINE = 1_000_000
"""Bytes of a line; a text encoder reads some hundred."""


@dataclass(frozen=True)
class _Detail:
    """A key of a .jsonl line that rewards read."""

    form: str  # what its value must be, in words
    example: str
    is_good: Callable[[Any], bool]


def _is_list_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


_CLAUSES = '[{"class": "cat", "count": 2}]'
DETAILS = {
    "objects": _Detail("a list of names", '["a cat", "a dog"]', _is_list_of(str)),  # for object_detection
    "include": _Detail("a list of objects", _CLAUSES, _is_list_of(dict)),  # for geneval, as the benchmark writes them
    "exclude": _Detail("a list of objects", _CLAUSES, _is_list_of(dict)),
    "tag": _Detail("a text", '"counting"', lambda value: isinstance(value, str)),
}
"""What a line may hold for rewards."""


@dataclass(frozen=True)
class _Index:
    """The result of reading a file once."""

    starts: np.ndarray  # (N + 1,) uint32 or int64, the start of each line that is not blank, then the size of the file
    crc: int  # checksum of all bytes after the byte order mark


class PromptFile(Sequence[Prompt]):
    """The prompts of a .txt or .jsonl file, in its order; a slice is a list."""

    def __init__(self, path: Path, where: str) -> None:
        """Index the file; errors begin with `where`, such as prompts.source=a.txt.

        Raises ValueError if the file is not UTF-8.
        """
        self._path = path.absolute()
        self._where = where
        self._stamp = _stamp(os.stat(self._path))
        try:
            self._index = _index(self._path, self._stamp)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error
        except ValueError as error:
            raise ValueError(f"{where} {error}") from error

    @property
    def crc(self) -> int:
        """The checksum of the file's content."""
        return self._index.crc

    def __len__(self) -> int:
        return len(self._index.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """The prompt at an index, or the list of a slice.

        Raises ValueError with the line number if a .jsonl line is no prompt, or if the file has changed.
        """
        rows = range(len(self))[index]
        return self._read([rows])[0] if isinstance(rows, int) else self._read(rows)

    def _read(self, rows: Iterable[int]) -> list[Prompt]:
        try:
            file = self._path.open("rb")
        except FileNotFoundError as error:
            raise ValueError(self._changed("is gone")) from error
        with file:
            if _stamp(os.fstat(file.fileno())) != self._stamp:
                raise ValueError(self._changed("has another size or time of modification"))
            return [self._prompt(file, row) for row in rows]

    def _prompt(self, file: BinaryIO, row: int) -> Prompt:
        # Read up to the next prompt: only line breaks and blank lines lie between, and strip removes them.
        start, end = (int(position) for position in self._index.starts[row : row + 2])
        file.seek(start)
        line = file.read(end - start).decode().strip()
        if self._path.suffix.lower() == ".txt":
            return Prompt(line)
        try:
            return parse_json_line(line)
        except ValueError as error:
            raise ValueError(f"{self._where}, line {_line_number(file, start)} {error}") from error

    def _changed(self, how: str) -> str:
        return f"{self._where} changed during the run (it {how}); put the old file back and go on with --resume latest"


def is_prompt_file(source: str) -> bool:
    """Tells whether a source of prompts is a file, by its ending in any case."""
    return source.lower().endswith((".txt", ".jsonl"))


def parse_json_line(line: str) -> Prompt:
    """The prompt of one line of a .jsonl file; the ValueError describes the line, but does not say where it is.

    The keys of DETAILS become the prompt's metadata. A line of the GenEval benchmark, which has `include`, may call its
    text "prompt".
    """
    # Read the object.
    remedy = 'write {"text": "a cat"} or {"text": "a cat", "task": "animals"}'
    try:
        record = json.loads(line, object_pairs_hook=_without_twins)
    except (ValueError, RecursionError) as error:  # also for an integer of thousands of digits
        raise ValueError(f"is no JSON ({error}); {remedy}") from error
    if isinstance(record, dict) and "include" in record and "text" not in record and "prompt" in record:
        record["text"] = record.pop("prompt")

    # Check its keys and values.
    if not isinstance(record, dict) or "text" not in record or not record.keys() <= {"text", "task", *DETAILS}:
        raise ValueError(f"is {line}; {remedy}")
    details = {key: record.pop(key) for key in DETAILS if key in record}
    if not all(isinstance(value, str) and value.strip() for value in record.values()):
        raise ValueError(f"is {line}, where a value is no text or empty; {remedy}")
    if not is_text(record["text"]):
        raise ValueError(f"is {line}, whose text has half a character; {remedy}")
    for key, value in details.items():
        if not DETAILS[key].is_good(value):
            raise ValueError(f"is {line}, where {key} is not {DETAILS[key].form}; write {DETAILS[key].example}")
    return Prompt(**record, metadata=json.dumps(details, sort_keys=True) if details else "")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises ValueError if a key is in it twice, because only one of them would count."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{max(keys, key=keys.count)!r} is in it twice" if len(keys) < 100 else "keys are in it twice")
    return found


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """The size in bytes and the time of the last modification in nanoseconds, which reveal a changed file."""
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)  # a start needs it several times: config check, sampler, evaluation, grid
def _index(path: Path, stamp: tuple[int, int]) -> _Index:
    """Read the whole file; the `start` of a UnicodeDecodeError is the position in the file."""
    dtype = np.uint32 if stamp[0] < 1 << 32 else np.int64
    starts, crc = [], 0
    with path.open("rb") as file:
        for offset, block in _blocks(file):
            crc = zlib.crc32(block, crc)
            try:
                block.decode()
            except UnicodeDecodeError as error:
                error.start += offset
                raise
            starts.append((_filled_lines(block) + offset).astype(dtype))
    return _Index(np.concatenate([*starts, np.array([stamp[0]], dtype)]), crc)


def _blocks(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """The file without its byte order mark, in blocks of whole lines, each with its offset."""
    file.seek(0)
    offset = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
    file.seek(offset)
    while block := file.read(_BLOCK_BYTES) + (rest := file.readline(MOST_OF_A_LINE + 1)):
        if len(rest) > MOST_OF_A_LINE:
            raise _too_long()
        yield offset, block
        offset += len(block)


def _too_long() -> ValueError:
    return ValueError(f"has a line of more than {MOST_OF_A_LINE:,} bytes; write one prompt per line")


def _filled_lines(block: bytes) -> np.ndarray:
    """The positions in `block` at which lines start that are not blank, int64; \\n, \\r\\n or \\r ends a line."""
    # Find the lines of at least one byte.
    data = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero((data == ord("\n")) | (data == ord("\r")))
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(data))
    is_long = starts < ends
    starts, ends = starts[is_long], ends[is_long]
    if (ends - starts).max(initial=0) > MOST_OF_A_LINE:
        raise _too_long()

    # Drop blank lines; decode only those whose first two bytes could be blank.
    second = data[np.minimum(starts + 1, len(data) - 1)]
    doubtful = np.flatnonzero(_begins_with_blank()[data[starts], second])
    blank = [i for i in doubtful if not block[starts[i] : ends[i]].decode().strip()]
    return np.delete(starts, blank)


@functools.cache
def _begins_with_blank() -> np.ndarray:
    """(256, 256) bool: whether a line with these first two bytes may begin with a character that str.strip removes."""
    table = np.zeros((256, 256), dtype=bool)
    for character in map(chr, range(0x3001)):  # U+3000 is the last such character
        if character.isspace():
            first, *rest = character.encode()
            table[first, rest[0] if rest else slice(None)] = True
    return table


def _line_number(file: BinaryIO, start: int) -> int:
    """The number, from 1, of the line that starts at byte `start`; reads the file up to there."""
    number = 1
    for offset, block in _blocks(file):
        if offset >= start:
            break
        before = block[: start - offset]
        number += before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")
    return number
