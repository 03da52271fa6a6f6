"""Prompts of a Hugging Face dataset in streaming: a dataset of the hub, or a local folder of jsonl, parquet or csv.

    hf:poloclub/diffusiondb?split=train&column=prompt&name=large_text_only
    hf:data/my_prompts                                                      a folder, its split train, its column text

Options: split (train), column (text), name (of the dataset's configuration; none) and window (10000). The dataset is
read once from front to back, in windows of so many examples, and each window is shuffled by (seed, its number): that
takes a window's memory, whatever the dataset's size, and a pass holds every prompt once. Blank texts are skipped. At
the end the next pass begins, whose windows are shuffled otherwise.

The package datasets by itself takes json in pieces of 10 MB, the first of them as Python objects too, and of parquet
all columns of a row group, which may be a file's million rows; here pieces are small and parquet's are of one column.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import torch

from rlcm_fast import parallel
from rlcm_fast.prompts.sampler import Share
from rlcm_fast.trajectory import Prompt

PREFIX = "hf:"

# what is read at once: of json, whose columns are known from the first piece; of parquet, a file's bytes and its rows
_JSON_BYTES = 1 << 21
_PARQUET_BYTES, _PARQUET_ROWS = 1 << 20, 1000
_CURSOR = "by examples"  # of fingerprints: a checkpoint that counts otherwise, as earlier ones do, is refused


@dataclass(frozen=True)
class _Options:
    """What stands in a source, after PREFIX."""

    path: str
    split: str = "train"
    column: str = "text"
    name: str | None = None
    window: int = 10_000


class PromptStream:
    """The texts of a dataset window by window, pass after pass."""

    _examples: Iterator[Mapping[str, Any]]
    _window_start: dict[str, Any]  # the dataset's state at the start of the window that was read last
    _next_start: dict[str, Any]  # and at the start of the next one

    def __init__(self, source: str, where: str) -> None:
        """`where`: what errors begin with, as prompts.source=hf:...; raises ValueError for what cannot be streamed."""
        self._where = where
        self._options = _parse(source, where)
        self._dataset = _open(self._options, where)
        self._start: dict[str, Any] = self._dataset.state_dict()
        self.rewind()

    def rewind(self) -> None:
        """To the start of the dataset."""
        self.load_state_dict(self._start)

    def next_window(self) -> list[str] | None:
        """The texts of the next window in the dataset's order; None once at the end, after which it begins anew."""
        self._window_start = self._next_start
        examples = list(itertools.islice(self._examples, self._options.window))
        if not examples:
            self.rewind()
            return None
        self._next_start = self._dataset.state_dict()
        return [text for text in map(self._text, examples) if text]

    def state_dict(self) -> dict[str, Any]:
        """The dataset's own, at the start of the window that was read last."""
        return self._window_start

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next window is the one that `state` was the start of."""
        self._next_start = self._window_start = dict(state)
        self._dataset.load_state_dict(copy.deepcopy(self._next_start))  # which it goes on to change
        self._examples = iter(self._dataset)

    def _text(self, example: Mapping[str, Any]) -> str:
        column = self._options.column
        value = example[column]
        if not isinstance(value, str | None):
            raise ValueError(f"{self._where} has {value!r} in its column {column}; name a column of texts as ?column=")
        return (value or "").strip()


class StreamSampler:
    """Draws from a dataset in streaming, the same on every rank, which then takes its own slice.

    So the prompts of an iteration do not depend on the number of processes, which may change at a resume. Every
    process reads all of the text for that, which is small beside the images made of it: an iteration's hundred prompts
    are some 10 kB. The prompts of an iteration are distinct examples, except where a pass ends in it.
    """

    _window: list[str]  # shuffled
    _number: int  # of the window, from the run's start
    _position: int  # in the window

    def __init__(self, source: str, share: Share, field: str = "prompts.source") -> None:
        """Reads the first window; `field`: the config field of `source`, for errors."""
        self._where = f"{field}={source}"
        self._stream = PromptStream(source, self._where)
        self._share = share
        texts = self._stream.next_window() or []
        self._fingerprint = zlib.crc32(
            "\0".join([_CURSOR, str(share.seed), str(self._share.num_drawn_together), *texts]).encode()
        )
        self._enter(texts, number=0)

    def next_batch(self) -> list[Prompt]:
        return self._share.repeated(map(Prompt, self._draw()[self._share.mine]))

    def state_dict(self) -> dict[str, Any]:
        return {
            "stream": self._stream.state_dict(),
            "window": self._number,
            "position": self._position,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"{self._where}: the checkpoint was made with another dataset or window (its first window differs), a"
                f" seed other than {self._share.seed}, other than {self._share.num_drawn_together} prompts an iteration"
                " or by an earlier version of rlcm_fast; resume with those of the checkpoint, or start a new run from"
                " its export"
            )
        self._stream.load_state_dict(state["stream"])
        self._enter(self._stream.next_window() or [], state["window"])
        self._position = state["position"]

    def _draw(self) -> list[str]:
        """The texts of the next iteration, of all ranks together."""
        is_first = self._number == 0 and self._position == 0
        drawn: list[str] = []
        while True:
            missing = self._share.num_drawn_together - len(drawn)
            drawn += self._window[self._position : self._position + missing]
            self._position = min(self._position + missing, len(self._window))
            if len(drawn) == self._share.num_drawn_together:
                return drawn
            self._advance(num_of_first_pass=len(drawn) if is_first else None)

    def _advance(self, num_of_first_pass: int | None) -> None:
        """To the next window; a pass that ends in the run's first iteration, with so many prompts, is too short."""
        texts = self._stream.next_window()
        if texts is None:
            if num_of_first_pass is not None:
                raise ValueError(
                    self._share.exceeds(self._where, num_of_first_pass) if num_of_first_pass else _empty(self._where)
                )
            texts = self._stream.next_window() or []
        self._enter(texts, self._number + 1)

    def _enter(self, texts: list[str], number: int) -> None:
        order = torch.randperm(len(texts), generator=parallel.generator(self._share.seed, number))
        self._window = [texts[row] for row in order.tolist()]
        self._number, self._position = number, 0


def check_stream(source: str, where: str) -> None:
    """Raises ValueError for what is known to fail before the dataset is opened: options, folders, the package."""
    _parse(source, where)
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(_no_package(where))


def first_window(source: str, where: str) -> list[Prompt]:
    """What a measurement takes of a dataset: the prompts of the first window that holds any, in its order."""
    stream = PromptStream(source, where)
    while (texts := stream.next_window()) is not None:
        if texts:
            return [Prompt(text) for text in texts]
    raise ValueError(_empty(where))


def _empty(where: str) -> str:
    return f"{where} holds no prompts: every text of its column is empty; name another as ?column="


def _no_package(where: str) -> str:
    return (
        f"{where} needs the package datasets, which is not installed: pip install 'rlcm_fast[data]'; or give a .txt or"
        " .jsonl file"
    )


def _parse(source: str, where: str) -> _Options:
    path, _, query = source.removeprefix(PREFIX).partition("?")
    known = [field.name for field in fields(_Options) if field.name != "path"]
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write options as ?split=train&column=text") from error
    wrong = next((name for name in given if name not in known), None)
    if wrong is not None or not path:
        problem = f"{wrong} is no option" if wrong is not None else "there is no dataset"
        raise ValueError(f"{where}: {problem}; write hf:DATASET?option=value with options of {', '.join(known)}")
    window = given.pop("window", str(_Options.window))
    if not (window.isascii() and window.isdigit() and int(window)):
        raise ValueError(f"{where}: window={window} is no number of examples of at least 1; give as window=10000")
    if (path[0] in "/.~" or path.count("/") > 1) and not Path(path).expanduser().is_dir():
        raise ValueError(
            f"{where}: there is no such folder under {Path.cwd()}; give a folder of jsonl, parquet or csv files, or"
            " the id of a dataset of the hub"
        )
    return _Options(str(Path(path).expanduser()), window=int(window), **given)


def _open(options: _Options, where: str) -> Any:
    """A datasets.IterableDataset of the one column; code that a dataset may bring is never run."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise ValueError(_no_package(where)) from error
    try:
        builder = load_dataset_builder(options.path, options.name)
        _read_in_small_pieces(builder, options.column, where)
        dataset: Any = builder.as_streaming_dataset(options.split)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ValueError(
            f"{where} cannot be streamed: {reason}; give a folder of jsonl, parquet or csv files or the id of a dataset"
            " of the hub, with the split= and name= that it has"
        ) from error
    columns = dataset.column_names or list(next(iter(dataset), {options.column: None}))
    if options.column not in columns:
        raise ValueError(f"{where} has no column {options.column}; add ?column= with one of {', '.join(columns)}")
    texts = dataset.select_columns([options.column])
    # With features, datasets makes a table of every row and counts in a state by the pieces that were read; without,
    # by examples: 31 against 129 ms of CPU time a window (AMD EPYC, 10,000 examples of jsonl).
    texts.info.features = None
    return texts


def _read_in_small_pieces(builder: Any, column: str, where: str) -> None:
    """How much a datasets.DatasetBuilder of json or parquet reads at once; the examples and their order stay."""
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if issubclass(type(builder), Json):
        builder.config.chunksize = _JSON_BYTES
    elif issubclass(type(builder), Parquet):  # its own goes by row groups, whatever its batch_size
        builder._generate_tables = functools.partial(_parquet_tables, column, where)


def _parquet_tables(
    column: str, where: str, files: list[str], row_groups_list: list[None]
) -> Iterator[tuple[tuple[int, int], Any]]:
    """What Parquet._generate_tables yields, keys and pyarrow tables, of one column; all row groups of each file."""
    import pyarrow
    from datasets.utils.file_utils import xopen
    from pyarrow.parquet import ParquetFile

    for number, name in enumerate(files):
        # pre_buffer holds every byte of the column that was read until the file's end
        with xopen(name, "rb") as file, ParquetFile(file, buffer_size=_PARQUET_BYTES, pre_buffer=False) as parquet:
            if column not in parquet.schema_arrow.names:
                raise ValueError(
                    f"{where} has no column {column} in its file {name}; give it one or leave the file out"
                )
            batches = parquet.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False)
            for piece, batch in enumerate(batches):
                yield (number, piece), pyarrow.Table.from_batches([batch])
