"""Splits the tokens of a text into pieces that a text encoder can take: the first one alone, or chunks as A1111's.

A1111's rules: a chunk has 75 tokens. If the next token would overfill it and a comma lies among its last 20 tokens,
what follows the comma moves into the next chunk. A textual inversion of several vectors moves whole. Weights in round
brackets and the word BREAK are not read as A1111 reads them: they are words, as in the pipelines of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

_BACKTRACK = 20  # A1111's "Prompt word wrap length limit"
_COMMA = ",</w>"
_NEXT_VECTOR = re.compile(r"(.+)_\d+")  # diffusers names the vectors of <cat> <cat>, <cat>_1, <cat>_2


@dataclass(frozen=True)
class Split:
    """One text as a tokenizer sees it."""

    pieces: list[list[int]]  # at least one, without begin and end; what is over is left out
    num_tokens: int  # of the whole text
    is_cut: bool


class Splitter:
    """Reads texts with one tokenizer."""

    def __init__(self, tokenizer: Any, most_chunks: int) -> None:
        """most_chunks: how many chunks of a text are read; with 1 a text ends after the first piece, comma or not."""
        added = tokenizer.added_tokens_encoder
        matches = {token: _NEXT_VECTOR.fullmatch(name) for name, token in added.items()}
        self.tokenizer = tokenizer
        self.length: int = tokenizer.model_max_length
        self.size = self.length - 2  # tokens of the text beside begin and end
        self.joined = frozenset(token for token, match in matches.items() if match and match[1] in added)
        self._comma: int | None = tokenizer.get_vocab().get(_COMMA)
        self._most_chunks = most_chunks

    def splits(self, texts: Sequence[str]) -> list[Split]:
        """Splits texts whose textual inversions are written out."""
        if not texts:
            return []
        found = self.tokenizer(list(texts), add_special_tokens=False, verbose=False).input_ids
        return [self._split(tokens) for tokens in found]

    def _split(self, tokens: list[int]) -> Split:
        if self._most_chunks == 1:
            return Split([tokens[: self.size]], len(tokens), len(tokens) > self.size)
        chunks = split_as_a1111(tokens, self.size, self._comma, self.joined)
        return Split(chunks[: self._most_chunks], len(tokens), len(chunks) > self._most_chunks)

    def row(self, piece: Sequence[int]) -> tuple[list[int], list[int]]:
        """Returns the ids of a piece with begin, end and padding, and 1 for each that is no padding."""
        tokenizer = self.tokenizer
        ids = [tokenizer.bos_token_id, *piece, tokenizer.eos_token_id]
        num_padded = self.length - len(ids)
        return ids + [tokenizer.pad_token_id] * num_padded, [1] * len(ids) + [0] * num_padded


def split_as_a1111(tokens: Sequence[int], size: int, comma: int | None, joined: frozenset[int]) -> list[list[int]]:
    """Splits tokens into chunks of at most `size`, at least one chunk.

    comma: its token; None if the tokenizer has none. joined: tokens that stay in the chunk of the one before them.
    """
    chunks: list[list[int]] = [[]]
    last_comma: int | None = None  # its place in the newest chunk
    for unit in _units(tokens, size, joined):
        # Move what follows a late comma, if the chunk is full.
        chunk = chunks[-1]
        if unit == [comma]:
            last_comma = len(chunk)
        elif len(chunk) == size and last_comma is not None and size - last_comma <= _BACKTRACK:
            chunks.append(chunk[last_comma + 1 :])
            del chunk[last_comma + 1 :]
            last_comma = None

        # Begin a chunk where this one has no room.
        if len(chunks[-1]) + len(unit) > size:
            chunks.append([])
            last_comma = None
        chunks[-1] += unit
    return chunks


def _units(tokens: Sequence[int], size: int, joined: frozenset[int]) -> Iterator[list[int]]:
    """Yields tokens one by one, and those of a textual inversion together if a chunk can hold them."""
    unit: list[int] = []
    for token in tokens:
        if unit and not (token in joined and len(unit) < size):
            yield unit
            unit = []
        unit.append(token)
    if unit:
        yield unit
