"""Reads the rows of a source, undecoded, in an order that the seed fixes, and keeps the position in it as JSON.

Two readers share one interface: `take` returns rows of this process, `cursor` is the position after them, and `seek`
goes back to a cursor.

 - FunctionReader numbers the pairs of a function. An update takes the next num_rows * world_size numbers, and each
   process takes its slice. So the pairs of an update do not depend on the number of processes.
 - DatasetReader streams every other source with `datasets`, pass after pass. `split_dataset_by_node` gives each process
   different shards. If there are fewer shards than processes, each process reads all shards and keeps every n-th row.
   If the shards do not divide evenly, some processes have one more, and longer passes. Rows are shuffled within a
   window before they are decoded; webdataset shards and captioned files are also shuffled before each pass. The cursor
   holds the state of `datasets` at the start of the window and the number of rows taken from the window. A run can
   resume there without decoding anything twice. A shuffle buffer of `datasets` is not possible: a resumed run would
   lose its rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from rlcm_fast.config.files import local_path
from rlcm_fast.pairs.faults import reading_errors, unreadable
from rlcm_fast.pairs.sources import FIELD, IMAGE_ENDINGS, Source, captioned_files, metadata_files, shards

_WINDOW_OF_PATHS = 16384
_WINDOW_OF_BYTES = 1024  # holds 100 MB if images have 100 kB


@dataclass(frozen=True)
class Row:
    """A pair before it is decoded; the image is a number for functions, else the {bytes, path} of `datasets`."""

    image: int | dict[str, Any]
    text: str
    problem: str = ""  # why the caption cannot be read; empty if it can

    @property
    def file(self) -> str | None:
        """The file of the image; None if the row holds its bytes or the number to make it from."""
        return self.image["path"] if isinstance(self.image, dict) and self.image["bytes"] is None else None


def first_rows(source: Source, num_rows: int) -> Iterator[Row]:
    """The first rows; reads only the first shard or the metadata, however many shards and images there are."""
    files = shards(source)[:1] if source.kind == "webdataset" else [str(p) for p in metadata_files(Path(source.path))]
    return (_row(record, source) for record in islice(_records(_load(source, files), source), num_rows))


def check_columns(source: Source) -> None:
    """Raise ValueError if a dataset of hf: lacks the columns; reads a row only if its format does not name them."""
    dataset = _load(source, None)
    known = list(dataset.features or next(_records(dataset, source), {}))
    if not {source.image, source.caption} <= set(known):
        raise _lacks_columns(source, known)


class FunctionReader:
    """Reads numbers, for a function that makes a pair of each number."""

    def __init__(self, seed: int, rank: int, world_size: int) -> None:
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self._num_taken = 0  # on all processes together

    def take(self, num_rows: int) -> list[Row]:
        first = self._num_taken + self._rank * num_rows
        self._num_taken += num_rows * self._world_size
        return [Row(self._number(index), "") for index in range(first, first + num_rows)]

    def cursor(self) -> dict[str, Any]:
        return {"num_taken": self._num_taken}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self._num_taken = cursor["num_taken"]

    def seek_among(self, cursors: Sequence[Mapping[str, Any]]) -> None:
        """Continue where another number of processes stopped: exactly there."""
        self.seek(cursors[0])

    def _number(self, index: int) -> int:
        """The number at an index; neighbouring indices and seeds have unrelated numbers."""
        return int(np.random.SeedSequence([self._seed, index]).generate_state(1, np.uint64)[0])


class DatasetReader:
    """Reads this process's share of a dataset, pass after pass."""

    def __init__(self, source: Source, seed: int, rank: int, world_size: int) -> None:
        self._source, self._seed, self._rank, self._world_size = source, seed, rank, world_size
        self._pass, self._window, self._start, self._taken = 0, 0, None, 0
        self._rows: list[Row] = []  # the rows of the window, shuffled
        self._dataset: Any = None
        self._iterator: Iterator[dict[str, Any]] = iter(())

    def take(self, num_rows: int) -> list[Row]:
        rows: list[Row] = []
        while len(rows) < num_rows:
            if self._taken == len(self._rows):
                self._next_window()
            part = self._rows[self._taken : self._taken + num_rows - len(rows)]
            self._taken += len(part)
            rows += part
        return rows

    def cursor(self) -> dict[str, Any]:
        return {"pass": self._pass, "window": self._window, "start": self._start, "taken": self._taken}

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self._pass, self._window, self._start = cursor["pass"], cursor["window"], cursor["start"]
        self._rows, self._taken, self._dataset = [], 0, None
        if cursor["taken"]:
            self._open()
            self._read_window()
            self._taken = cursor["taken"]

    def seek_among(self, cursors: Sequence[Mapping[str, Any]]) -> None:
        """Continue after another number of processes: at the start of the next pass, because their shares differ."""
        last = max(cursor["pass"] for cursor in cursors)
        self.seek({"pass": last + 1, "window": 0, "start": None, "taken": 0})

    def _next_window(self) -> None:
        # Go on within the pass.
        if self._dataset is None:
            self._open()
        else:
            self._window, self._start = self._window + 1, self._dataset.state_dict()
        self._read_window()

        # Begin the next pass if this one is over.
        if not self._rows:
            if self._window == 0:
                raise ValueError(
                    f"{FIELD}={self._source.text} holds no pair for process {self._rank} of {self._world_size}; give at"
                    " least one for each"
                )
            self._pass, self._window, self._start = self._pass + 1, 0, None
            self._open()
            self._read_window()

    def _open(self) -> None:
        """Open this pass, from `_start` on."""
        from datasets.distributed import split_dataset_by_node

        dataset = _open_dataset(self._source, np.random.default_rng([self._seed, self._pass]))
        share: Any = "shards" if dataset.num_shards >= self._world_size else "examples"
        self._dataset = split_dataset_by_node(dataset, self._rank, self._world_size, share)
        if self._start is not None:
            self._dataset.load_state_dict(self._start)
        self._iterator = _records(self._dataset, self._source)

    def _read_window(self) -> None:
        rows: list[Row] = []
        for record in self._iterator:
            rows.append(_row(record, self._source))
            if len(rows) == (_WINDOW_OF_PATHS if rows[0].file else _WINDOW_OF_BYTES):
                break
        order = np.random.default_rng([self._seed, self._pass, self._window, self._rank]).permutation(len(rows))
        self._rows, self._taken = [rows[i] for i in order], 0


def _open_dataset(source: Source, rng: np.random.Generator) -> Any:
    """A datasets.IterableDataset whose images stay undecoded; runs no code of the dataset's author."""
    import datasets

    if source.kind == "captioned_files":
        files = rng.permutation(captioned_files(source)).tolist()
        table = {"image": [image for image, _ in files], "caption_file": [caption for _, caption in files]}
        return datasets.Dataset.from_dict(table).to_iterable_dataset()
    if source.kind == "webdataset":
        return _load(source, rng.permutation(shards(source)).tolist())
    return _load(source, [source.path] if source.kind == "jsonl" else None)


def _load(source: Source, files: list[str] | None) -> Any:
    """The dataset of everything at the path of the source, or only of some `files` there.

    Raises ValueError in one line if it cannot be read.
    """
    import datasets

    # Open it for streaming.
    arguments: dict[str, Any]
    if source.kind == "hub":
        local = str(local_path(source.path)) if source.path.startswith("~") else source.path
        arguments = {"path": local, "name": source.name}
    elif files is None:
        # All files, because datasets would take train/ and test/, and names with these words, for different splits.
        arguments = {"path": "imagefolder", "data_dir": source.path, "data_files": "**"}
    else:
        arguments = {"path": "json" if source.kind == "jsonl" else source.kind, "data_files": files}
    try:
        dataset: Any = datasets.load_dataset(**arguments, split=source.split, streaming=True)
    except reading_errors() as error:
        raise unreadable(source, error) from error

    # Leave the images undecoded; the workers decode them.
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _records(dataset: Any, source: Source) -> Iterator[dict[str, Any]]:
    try:
        yield from dataset
    except reading_errors() as error:
        raise unreadable(source, error) from error


def _row(record: dict[str, Any], source: Source) -> Row:
    problem, text = "", ""
    try:
        text = _text_of(record, source)
    except _Unreadable as error:
        problem = str(error)
    image = _image_of(record, source)
    if isinstance(image, str):
        image = {"bytes": None, "path": str(Path(source.path).parent / image) if source.kind == "jsonl" else image}
    elif isinstance(image, bytes):
        image = {"bytes": image, "path": None}
    if not isinstance(image, dict) or not isinstance(text, str):
        raise _lacks_columns(source, record)
    return Row({"bytes": image.get("bytes"), "path": image.get("path")}, text, problem)


def _lacks_columns(source: Source, known: Iterable[str]) -> ValueError:
    return ValueError(
        f"{FIELD}={source.text} has no image with a caption in {source.image}, {source.caption} of a row with"
        f" {', '.join(known)}; name the columns, as hf:PATH?image=jpg&text=caption, or complete the row"
    )


def _image_of(record: dict[str, Any], source: Source) -> Any:
    if source.kind != "webdataset":
        return record.get(source.image)
    return next((value for key, value in record.items() if f".{key}".lower().endswith(IMAGE_ENDINGS)), None)


def _text_of(record: dict[str, Any], source: Source) -> Any:
    if source.kind == "captioned_files":
        return _caption(record["caption_file"])
    if source.kind != "webdataset":
        return record.get(source.caption)
    if record.get("txt") is not None:
        return record["txt"].strip()
    described = record.get("json")
    return described.get("caption") if isinstance(described, dict) else None


class _Unreadable(Exception):
    """A caption cannot be read."""


def _caption(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _Unreadable(f"{file} cannot be read ({error}); save it as UTF-8") from error
