"""Checks `pretraining.data` before any weights load; the cost does not grow with the amount of data."""

from __future__ import annotations

import importlib.util
import json
from itertools import islice
from pathlib import Path

from rlcm_fast.config.files import local_path
from rlcm_fast.pairs.faults import check_archives, check_lines
from rlcm_fast.pairs.reading import check_columns, first_rows
from rlcm_fast.pairs.sources import BUILT_IN, FIELD, Source, captioned_files, is_local, parse_source
from rlcm_fast.plugins import check_unimported, load_class

_NUM_CHECKED = 100  # the first lines or rows


def check_source(data: str, may_import: bool = True) -> str | None:
    """Raise ValueError for a missing function, package or file, and for lines that are no pairs; open no dataset.

    may_import: import the module of a function of yours; otherwise returns what a run would import, "MODULE of FILE".
    """
    source = parse_source(data)
    if source.kind == "function":
        if not may_import:
            return check_unimported(source.path, BUILT_IN, FIELD)
        load_class(source.path, BUILT_IN, FIELD)
        return None
    if importlib.util.find_spec("datasets") is None:
        raise ValueError(f"{FIELD}={data} is read by the package datasets; pip install 'rlcm_fast[data]'")
    _check_files(source)
    return None


def check_rows(data: str) -> None:
    """Raise ValueError for missing columns and images, as far as the first rows show them.

    This opens the dataset, which needs a network for a dataset of the hub. Call check_source first: check_rows does not
    repeat its checks.
    """
    source = parse_source(data)
    if source.kind == "hub":
        check_columns(source)
    elif source.kind in ("imagefolder", "webdataset"):
        _require_images(source, [row.file for row in first_rows(source, _NUM_CHECKED) if row.file])


def _check_files(source: Source) -> None:
    if source.kind == "captioned_files":
        captioned_files(source)
    elif source.kind == "webdataset":
        check_archives(source, _NUM_CHECKED)
    elif source.kind == "imagefolder":
        check_lines(source, _NUM_CHECKED)
    elif source.kind == "jsonl":
        _check_jsonl(source)
    elif is_local(source.path) and not local_path(source.path).exists():
        raise ValueError(
            f"{FIELD}={source.text}: there is no folder {source.path}; give one, or a hub id as owner/name"
        )


def _check_jsonl(source: Source) -> None:
    if not Path(source.path).is_file():
        raise ValueError(f"{FIELD}={source.text}: there is no such file under {Path.cwd()}; check the path")
    check_lines(source, _NUM_CHECKED)
    with open(source.path, "rb") as lines:
        records = [json.loads(line) for line in islice(filter(bytes.strip, lines), _NUM_CHECKED)]
    _require_images(source, [str(Path(source.path).parent / str(record["image"])) for record in records])


def _require_images(source: Source, paths: list[str]) -> None:
    lacking = next((path for path in paths if not Path(path).is_file()), None)
    if lacking:
        what = "the metadata" if source.kind == "imagefolder" else "the file"
        raise ValueError(f"{FIELD}={source.text}: its image {lacking} is not there; paths are relative to {what}")
