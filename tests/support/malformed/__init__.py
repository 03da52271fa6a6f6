"""Malformed inputs by kind, and what it takes to try them at the doors of this process.

A case says what it gives to which door, what the line must name, and how the command must end. `try_case` runs it and
returns what is wrong with the outcome; nothing wrong is the promise of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlcm_fast.backbones.networks import Where

MOST_SECONDS = 10.0
_SAID_ON_THE_WAY = (
    *("rewards built", "loading ", "sampling:", "checkpoint ", "starting at 0", "run_dir=", "going back", "going on"),
    *("first iteration", "train:", "Loading pipeline components"),
)


@dataclass(frozen=True)
class Place:
    """The folder that a case may write into, and what is there already."""

    folder: Path  # empty, and the working folder
    model: str  # a tiny model
    run: Path  # a finished run of it, which a case must not change

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def copy_of_run(self) -> Path:
        return Path(shutil.copytree(self.run, self.run_dir))


@dataclass(frozen=True)
class Case:
    """A malformed input."""

    name: str
    argv: list[str] | Callable[[Place], list[str]]
    says: str  # what the line must hold: the field or the file, above all
    door: str = "train"  # or the name of a tool
    code: int = 2
    may_load: bool = False  # only the weights, or what comes after them, show the mistake


@dataclass
class Outcome:
    """How a case ended."""

    case: Case
    code: int
    said: str
    seconds: float
    num_loads: int
    problems: list[str] = field(default_factory=list)

    def judge(self) -> Outcome:
        """Notes what breaks the promise."""
        lines = self.said.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        others = [line for line in map(str.strip, lines) if line and line not in errors]
        others = [line for line in others if not line.startswith(_SAID_ON_THE_WAY)]
        if self.code != self.case.code:
            self.problems.append(f"exit code {self.code} instead of {self.case.code}")
        if len(errors) != 1 or "Traceback" in self.said:
            self.problems.append(f"{len(errors)} lines instead of one")
        elif self.case.says not in errors[0]:
            self.problems.append(f"the line does not name {self.case.says!r}")
        elif "nobody foresaw" in errors[0]:
            self.problems.append("nobody foresaw it")
        if others:
            self.problems.append(f"says {others[0]!r}, too")
        if self.num_loads and not self.case.may_load:
            self.problems.append("after weights were loaded")
        if self.seconds > MOST_SECONDS:
            self.problems.append(f"took {self.seconds:.0f} s")
        return self

    def __str__(self) -> str:
        return f"{self.case.door} {self.case.name}: {'; '.join(self.problems)}: {self.said[-300:]!r}"


@contextlib.contextmanager
def counted_loads() -> Iterator[list[str]]:
    """Yields a list that fills with the networks whose weights are loaded."""
    found: list[str] = []
    load = Where.load

    def noted(self: Where, name: str, *arguments: Any, **keywords: Any) -> Any:
        found.append(name)
        return load(self, name, *arguments, **keywords)

    Where.load = noted
    try:
        yield found
    finally:
        Where.load = load


@contextlib.contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Lets modules of the folder be imported, and forgets them afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        names = {path.stem for path in folder.glob("*.py")}
        for name in set(sys.modules) - before:
            if name in names:
                del sys.modules[name]


def try_case(case: Case, place: Place) -> Outcome:
    """Runs a case at its door; the working folder is the place's."""
    from rlcm_fast.cli.main import main as tool
    from rlcm_fast.train import main as train

    given = case.argv if isinstance(case.argv, list) else case.argv(place)
    said = io.StringIO()
    with contextlib.chdir(place.folder), _modules_of(place.folder), counted_loads() as loads:
        start = time.perf_counter()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            try:
                code = train(given) if case.door == "train" else tool([case.door, *given])
            except SystemExit as leaving:  # argparse
                code = int(leaving.code or 0)
        seconds = time.perf_counter() - start
    return Outcome(case, code, said.getvalue(), seconds, len(loads)).judge()


def writes(name: str, content: str | bytes, *argv: str) -> Callable[[Place], list[str]]:
    """Returns what writes a file into the place, and gives the arguments; @ in them stands for its path."""

    def given(place: Place) -> list[str]:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return [part.replace("@", str(path)) for part in argv]

    return given
