"""Files of any number of prompts: where each line starts is kept, and a line is read when it is drawn.

Indexing reads the file once, in blocks: 4 bytes a line stay (8 from 4 GiB on), and a checksum of the content. Every
reading opens the file anew, so that nothing is shared between processes, and refuses a file that is no longer the one
that was indexed.
"""

from __future__ import annotations

import functools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, overload

import numpy as np

from rlcm_fast.trajectory import Prompt

_BLOCK_BYTES = 1 << 22
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class _Index:
    """What is known of a file after one reading."""

    starts: np.ndarray  # (N + 1,) uint32 or int64, where each line that is not blank starts, then the file's size
    crc: int  # of all bytes after a byte order mark


class PromptFile(Sequence[Prompt]):
    """The prompts of a .txt or .jsonl file in its order; a slice is a list."""

    def __init__(self, path: Path, where: str) -> None:
        """Raises ValueError where the file is not UTF-8; `where`: what errors begin with, as prompts.source=a.txt."""
        self._path = path.absolute()
        self._where = where
        self._stamp = _stamp(os.stat(self._path))
        try:
            self._index = _index(self._path, self._stamp)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{where} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
            ) from error

    @property
    def crc(self) -> int:
        """A checksum of the file's content."""
        return self._index.crc

    def __len__(self) -> int:
        return len(self._index.starts) - 1

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        """Raises ValueError with the line's number where a .jsonl line is no prompt, or where the file has changed."""
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
        # Up to the start of the next prompt: what lies between are line breaks and blank lines, which strip removes.
        start, end = (int(position) for position in self._index.starts[row : row + 2])
        file.seek(start)
        line = file.read(end - start).decode().strip()
        if self._path.suffix == ".txt":
            return Prompt(line)
        try:
            return parse_json_line(line)
        except ValueError as error:
            raise ValueError(f"{self._where}, line {_line_number(file, start)} {error}") from error

    def _changed(self, how: str) -> str:
        return f"{self._where} changed during the run (it {how}); put the old file back and go on with --resume latest"


def parse_json_line(line: str) -> Prompt:
    """One line of a .jsonl file; the ValueError says what it is, without where."""
    remedy = 'write {"text": "a cat"} or {"text": "a cat", "task": "animals"}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"is no JSON ({error}); {remedy}") from error
    if not isinstance(record, dict) or "text" not in record or not record.keys() <= {"text", "task"}:
        raise ValueError(f"is {line}; {remedy}")
    if not all(isinstance(value, str) and value.strip() for value in record.values()):
        raise ValueError(f"is {line}, where a value is no text or empty; {remedy}")
    return Prompt(**record)


def _stamp(status: os.stat_result) -> tuple[int, int]:
    """By which a changed file is told: bytes, and nanoseconds of its last modification."""
    return status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)  # a start asks several times: the check of the config, sampler, evaluation, grid
def _index(path: Path, stamp: tuple[int, int]) -> _Index:
    """Reads all of the file; a UnicodeDecodeError has the byte of the file in `start`."""
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
    """The file in blocks of whole lines, each with its offset; without a byte order mark."""
    file.seek(0)
    offset = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
    file.seek(offset)
    while block := file.read(_BLOCK_BYTES) + file.readline():
        yield offset, block
        offset += len(block)


def _filled_lines(block: bytes) -> np.ndarray:
    """Where in `block` the lines start that are not blank, int64; a line ends with \\n, \\r\\n or \\r."""
    data = np.frombuffer(block, np.uint8)
    breaks = np.flatnonzero((data == ord("\n")) | (data == ord("\r")))
    starts, ends = np.append(0, breaks + 1), np.append(breaks, len(data))
    is_long = starts < ends
    starts, ends = starts[is_long], ends[is_long]
    second = data[np.minimum(starts + 1, len(data) - 1)]
    doubtful = np.flatnonzero(_begins_with_blank()[data[starts], second])
    blank = [i for i in doubtful if not block[starts[i] : ends[i]].decode().strip()]
    return np.delete(starts, blank)


@functools.cache
def _begins_with_blank() -> np.ndarray:
    """(256, 256) bool: whether a line whose first two bytes are these may begin with what str.strip removes."""
    table = np.zeros((256, 256), dtype=bool)
    for character in map(chr, range(0x3001)):  # U+3000 is the last of them
        if character.isspace():
            first, *rest = character.encode()
            table[first, rest[0] if rest else slice(None)] = True
    return table


def _line_number(file: BinaryIO, start: int) -> int:
    """Of the line that starts at byte `start`, from 1; reads the file up to there."""
    number = 1
    for offset, block in _blocks(file):
        if offset >= start:
            break
        before = block[: start - offset]
        number += before.count(b"\n") + before.count(b"\r") - before.count(b"\r\n")
    return number
