"""Reads what a run left in its folder, whatever state that is in.

A run may be short, broken or still going: a line that is no JSON is skipped and counted, a file that is missing is
empty, and `RunData.problems` says so. Nothing here needs torch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlcm_fast.config import documents
from rlcm_fast.finite_json import is_number, load_json

Line = Mapping[str, float]  # a line of metrics.jsonl: its finite numbers

_SIGN_OF_LIFE = 120.0  # seconds: the lock of a run that lives was touched since (run_folder/lock.py)


@dataclass(frozen=True)
class Scored:
    """An image of an evaluation."""

    number: int  # the same prompt and noise at every evaluation
    prompt: str
    scores: Mapping[str, float]  # by the key of the metric, as eval/NAME
    file: Path | None  # a PNG, if it was kept


@dataclass(frozen=True)
class EvaluatedImages:
    """The images of an evaluation after `iteration` iterations."""

    iteration: int
    images: Sequence[Scored]

    @property
    def keys(self) -> list[str]:
        """The keys of all scores, in the order of the first image that has them."""
        return list(dict.fromkeys(key for image in self.images for key in image.scores))


@dataclass(frozen=True)
class RunData:
    """A run as its folder shows it."""

    folder: Path
    name: str
    config: Mapping[str, Any] = field(default_factory=dict)  # by dotted name
    environment: Mapping[str, Any] = field(default_factory=dict)
    lines: Sequence[Line] = ()  # by iteration
    grids: Sequence[tuple[int, Path]] = ()  # by iteration
    guard_pictures: Sequence[tuple[int, Path]] = ()  # by iteration: what was said by the guard, start beside now
    evaluations: Sequence[EvaluatedImages] = ()  # the first and the latest
    problems: Sequence[str] = ()
    is_alive: bool = False  # its process writes here
    has_export: bool = False

    def column(self, key: str) -> list[tuple[float, float]]:
        """Returns (iteration, value) of every line that has the key."""
        return [(line["iteration"], line[key]) for line in self.lines if key in line]

    @cached_property
    def keys(self) -> list[str]:
        """The keys of all lines."""
        return list(dict.fromkeys(key for line in self.lines for key in line))

    @property
    def num_iterations(self) -> int:
        """How many iterations have finished: a line that has only an evaluation is none."""
        return sum("seconds/iteration" in line or "images_per_second" in line for line in self.lines)

    @property
    def num_planned(self) -> int:
        """How many iterations the config asks for; 0 if that is not known."""
        planned = self.config.get("num_iterations")
        return planned if isinstance(planned, int) else 0

    @property
    def num_processes(self) -> int:
        count = self.environment.get("num_processes")
        return count if isinstance(count, int) and count > 0 else 1


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Reads a run folder; raises ValueError if it holds no run."""
    if not folder.is_dir():
        raise ValueError(f"run={folder} is not a folder; give the run_dir of a run")
    if not (folder / "metrics.jsonl").exists() and not (folder / "config.yaml").exists():
        raise ValueError(f"run={folder} holds neither config.yaml nor metrics.jsonl; give the run_dir of a run")
    problems: list[str] = []
    return RunData(
        folder=folder,
        name=name or folder.resolve().name,
        config=flat(_yaml(folder / "config.yaml", problems)),
        environment=_json(folder / "environment.json", problems),
        lines=lines_of(folder / "metrics.jsonl", problems),
        grids=_pictures(folder / "grids"),
        guard_pictures=_pictures(folder / "guard"),
        evaluations=_evaluations(folder / "evaluation", problems),
        problems=problems,
        is_alive=_is_alive(folder / "lock"),
        has_export=(folder / "export").is_dir() or (folder / "lora").is_dir(),
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a config's fields by dotted name; a list, as of rewards, is one field."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        fields |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return fields


def _text(path: Path, problems: list[str]) -> str | None:
    if os.path.lexists(path) and not path.is_file():  # reading a pipe would never end
        problems.append(f"{path.name} is no plain file")
        return None
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    return None


def _yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    try:
        found = documents.load(text) if text else {}
    except documents.Unreadable:
        found = None
    return _mapping(found, path, problems)


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    text = _text(path, problems)
    try:
        found = load_json(text) if text else {}
    except ValueError:
        found = None
    return _mapping(found, path, problems)


def _mapping(found: Any, path: Path, problems: list[str]) -> dict[str, Any]:
    if isinstance(found, dict):
        return {str(key): value for key, value in found.items()}
    problems.append(f"{path.name} is damaged")
    return {}


def lines_of(path: Path, problems: list[str]) -> list[Line]:
    """Returns the numbers of each iteration; where two lines have one iteration, those of the last."""
    by_iteration: dict[int, Line] = {}
    for found in _objects(path, problems):
        numbers = {str(key): float(value) for key, value in found.items() if is_number(value)}
        if "iteration" in numbers:
            by_iteration[int(numbers["iteration"])] = numbers
    return [by_iteration[number] for number in sorted(by_iteration)]


def _objects(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Returns the JSON objects of a file, a line each; counts the lines that hold none."""
    found, num_damaged = [], 0
    for text in (_text(path, problems) or "").splitlines():
        try:
            value = load_json(text)
        except ValueError:
            value = None
        if isinstance(value, dict):
            found.append(value)
        elif text.strip():
            num_damaged += 1
    if num_damaged:
        problems.append(f"{path.name} has {num_damaged} damaged line{'s' * (num_damaged > 1)}, left out here")
    return found


def _pictures(folder: Path) -> list[tuple[int, Path]]:
    files = [path for path in _entries(folder) if path.suffix == ".png" and path.stem.isdecimal()]
    return sorted((int(path.stem), path) for path in files)


def _evaluations(folder: Path, problems: list[str]) -> list[EvaluatedImages]:
    found = []
    for of_one in sorted((path for path in _entries(folder) if path.name.isdecimal()), key=lambda path: int(path.name)):
        images = [_scored(row, of_one) for row in _objects(of_one / "scores.jsonl", problems)]
        images = [image for image in images if image is not None]
        if images:
            found.append(EvaluatedImages(int(of_one.name), images))
    return found[:1] + found[-1:] if len(found) > 1 else found


def _scored(row: Mapping[str, Any], folder: Path) -> Scored | None:
    number, scores, name = row.get("image"), row.get("scores"), row.get("file")
    if not isinstance(number, int) or not isinstance(scores, dict):
        return None
    # A name with a slash would be a file outside of the folder.
    is_plain = isinstance(name, str) and "/" not in name and "\\" not in name and (folder / name).is_file()
    known = {str(key): float(value) for key, value in scores.items() if is_number(value)}
    return Scored(number, str(row.get("prompt", "")), known, folder / str(name) if is_plain else None)


def _entries(folder: Path) -> list[Path]:
    try:
        return [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:
        return []


def _is_alive(lock: Path) -> bool:
    try:
        return time.time() - lock.stat().st_mtime < _SIGN_OF_LIFE
    except OSError:
        return False
