"""Streams prompts from a Hugging Face dataset: a dataset of the hub, or a local folder of jsonl, parquet or csv files.

    hf:poloclub/diffusiondb?split=train&column=prompt&name=large_text_only
    hf:data/my_prompts                                                      a folder, its split train, its column text

Options and their defaults: split (train), column (text), name (of the dataset's configuration; none), window (10000).
A pass reads the dataset once from front to back, in windows of that many examples. (seed, number of the window) fixes
the shuffle of each window. So the stream needs the memory of one window, however large the dataset is, and a pass holds
every prompt once. Blank texts are skipped. After the last window the next pass begins, with other shuffles.

The package datasets reads json in pieces of 10 MB, the first also as Python objects. Of parquet it reads all columns of
a row group, which may be the million rows of a file. Here the pieces are small, and parquet pieces hold one column.
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
from rlcm_fast.config.files import local_path
from rlcm_fast.prompts.sampler import Share
from rlcm_fast.trajectory import Prompt

PREFIX = "hf:"

# The size of a piece: of json, whose first piece shows the columns; of parquet, in bytes of the file and in rows.
_JSON_BYTES = 1 << 21
_PARQUET_BYTES, _PARQUET_ROWS = 1 << 20, 1000
_CURSOR = "by examples"  # part of the fingerprint: refuses checkpoints that count differently, as earlier versions did


@dataclass(frozen=True)
class _Options:
    """The part of a source after PREFIX."""

    path: str
    split: str = "train"
    column: str = "text"
    name: str | None = None
    window: int = 10_000


class PromptStream:
    """The texts of a dataset, window by window and pass after pass."""

    _examples: Iterator[Mapping[str, Any]]
    _window_start: dict[str, Any]  # the dataset's state at the start of the last window that was read
    _next_start: dict[str, Any]  # the dataset's state at the start of the next window

    def __init__(self, source: str, where: str) -> None:
        """Open the dataset; errors begin with `where`, such as prompts.source=hf:...

        Raises ValueError if the dataset cannot be streamed.
        """
        self._where = where
        self._options = _parse(source, where)
        self._dataset = _open(self._options, where)
        self._start: dict[str, Any] = self._dataset.state_dict()
        self.rewind()

    def rewind(self) -> None:
        """Go back to the start of the dataset."""
        self.load_state_dict(self._start)

    def next_window(self) -> list[str] | None:
        """The texts of the next window, in the order of the dataset; None once at the end of a pass."""
        self._window_start = self._next_start
        examples = list(itertools.islice(self._examples, self._options.window))
        if not examples:
            self.rewind()
            return None
        self._next_start = self._dataset.state_dict()
        return [text for text in map(self._text, examples) if text]

    def state_dict(self) -> dict[str, Any]:
        """The dataset's state at the start of the last window that was read."""
        return self._window_start

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the window that begins at `state`."""
        self._next_start = self._window_start = dict(state)
        self._dataset.load_state_dict(copy.deepcopy(self._next_start))  # a copy, because the dataset changes it
        self._examples = iter(self._dataset)

    def _text(self, example: Mapping[str, Any]) -> str:
        column = self._options.column
        value = example[column]
        if not isinstance(value, str | None):
            raise ValueError(f"{self._where} has {value!r} in its column {column}; name a column of texts as ?column=")
        return (value or "").strip()


class StreamSampler:
    """Draws prompts from a streamed dataset: every rank draws the same prompts and keeps a slice of them.

    So the prompts of an iteration do not depend on the number of processes, which may change when you resume. The price
    is that every process reads all text. Text is small beside the images made of it: the hundred prompts of an
    iteration are some 10 kB. The prompts of an iteration are distinct examples, unless a pass ends within it.
    """

    _window: list[str]  # shuffled
    _number: int  # the number of the window since the start of the run
    _position: int  # the next index in the window

    def __init__(self, source: str, share: Share, field: str = "prompts.source") -> None:
        """Read the first window; errors name `field`, the config field of `source`."""
        self._where = f"{field}={source}"
        self._stream = PromptStream(source, self._where)
        self._share = share
        texts = self._stream.next_window() or []
        self._fingerprint = zlib.crc32(
            "\0".join([_CURSOR, str(share.seed), str(self._share.num_per_iteration), *texts]).encode()
        )
        self._enter(texts, number=0)

    def next_batch(self) -> list[Prompt]:
        return self._share.repeated(map(Prompt, self._draw()[self._share.rank_rows]))

    def known(self, most: int) -> list[Prompt]:
        return [Prompt(text) for text in self._window[:most]]

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
                f" seed other than {self._share.seed}, other than {self._share.num_per_iteration} prompts per iteration"
                " or by an earlier version of rlcm_fast; resume with those of the checkpoint, or start a new run with"
                " --resume_weights_only PATH"
            )
        self._stream.load_state_dict(state["stream"])
        self._enter(self._stream.next_window() or [], state["window"])
        self._position = state["position"]

    def _draw(self) -> list[str]:
        """The texts of the next iteration on all ranks."""
        is_first = self._number == 0 and self._position == 0
        texts: list[str] = []
        while True:
            missing = self._share.num_per_iteration - len(texts)
            texts += self._window[self._position : self._position + missing]
            self._position = min(self._position + missing, len(self._window))
            if len(texts) == self._share.num_per_iteration:
                return texts
            self._advance(num_of_first_pass=len(texts) if is_first else None)

    def _advance(self, num_of_first_pass: int | None) -> None:
        """Go to the next window.

        num_of_first_pass is the number of prompts so far in the first iteration of the run, and None later. Raises
        ValueError if a pass ends within the first iteration: the dataset then holds too few prompts.
        """
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
    """Raise ValueError for options, folders or a missing package that would fail; do not open the dataset."""
    _parse(source, where)
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(_no_package(where))


def first_window(source: str, where: str) -> list[Prompt]:
    """The prompts of a measurement: those of the first window that holds any, in the order of the dataset."""
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
    # Split the source into its path and its options.
    path, _, query = source.removeprefix(PREFIX).partition("?")
    known = [field.name for field in fields(_Options) if field.name != "path"]
    try:
        given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    except ValueError as error:
        raise ValueError(f"{where}: {error}; write options as ?split=train&column=text") from error

    # Check the options and the path.
    wrong = next((name for name in given if name not in known), None)
    if wrong is not None or not path:
        problem = f"{wrong} is no option" if wrong is not None else "there is no dataset"
        raise ValueError(f"{where}: {problem}; write hf:DATASET?option=value with options of {', '.join(known)}")
    window = given.pop("window", str(_Options.window))
    if not (window.isascii() and window.isdigit() and int(window)):
        raise ValueError(f"{where}: window={window} is no number of examples from 1 on; write it as window=10000")
    if (path[0] in "/.~" or path.count("/") > 1) and not local_path(path).is_dir():
        raise ValueError(
            f"{where}: there is no such folder under {Path.cwd()}; give a folder of jsonl, parquet or csv files, or"
            " the id of a dataset of the hub"
        )
    return _Options(str(local_path(path)), window=int(window), **given)


def _open(options: _Options, where: str) -> Any:
    """A datasets.IterableDataset of the one column; never runs code that a dataset may contain."""
    try:
        from datasets import load_dataset_builder
    except ImportError as error:
        raise ValueError(_no_package(where)) from error

    # Open it for streaming.
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

    # Keep the one column.
    columns = dataset.column_names or list(next(iter(dataset), {options.column: None}))
    if options.column not in columns:
        raise ValueError(f"{where} has no column {options.column}; add ?column= with one of {', '.join(columns)}")
    texts = dataset.select_columns([options.column])
    # With features, datasets makes a table of every row, and a state counts the pieces that were read. Without them, a
    # state counts examples: 31 against 129 ms of CPU time per window (AMD EPYC, 10,000 examples of jsonl).
    texts.info.features = None
    return texts


def _read_in_small_pieces(builder: Any, column: str, where: str) -> None:
    """Make a datasets.DatasetBuilder of json or parquet read less at once; the examples and their order stay."""
    from datasets.packaged_modules.json.json import Json
    from datasets.packaged_modules.parquet.parquet import Parquet

    if issubclass(type(builder), Json):
        builder.config.chunksize = _JSON_BYTES
    elif issubclass(type(builder), Parquet):  # its method reads whole row groups, whatever its batch_size
        builder._generate_tables = functools.partial(_parquet_tables, column, where)


def _parquet_tables(
    column: str, where: str, files: list[str], row_groups_list: list[None]
) -> Iterator[tuple[tuple[int, int], Any]]:
    """Yield keys and pyarrow tables like Parquet._generate_tables, of one column and all row groups of each file."""
    import pyarrow
    from datasets.utils.file_utils import xopen
    from pyarrow.parquet import ParquetFile

    for number, name in enumerate(files):
        # pre_buffer would keep every byte of the column that was read, up to the end of the file.
        with xopen(name, "rb") as file, ParquetFile(file, buffer_size=_PARQUET_BYTES, pre_buffer=False) as parquet:
            if column not in parquet.schema_arrow.names:
                raise ValueError(
                    f"{where} has no column {column} in its file {name}; give it one or leave the file out"
                )
            batches = parquet.iter_batches(_PARQUET_ROWS, columns=[column], use_threads=False)
            for piece, batch in enumerate(batches):
                yield (number, piece), pyarrow.Table.from_batches([batch])
