"""What `rlcm-fast doctor` looks at: a file for each part, and what an examination ends with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

GB = 1e9
GIB = 2**30


class State(Enum):
    """How a part is."""

    OK = "ok"
    NOTE = "note"  # works; worth knowing
    DOWNLOAD = "get"  # a run will download it
    WRONG = "WRONG"  # a run fails, or does something else than you asked for


@dataclass(frozen=True)
class Diagnosis:
    """A row of the table."""

    what: str
    state: State
    words: str
    numbers: Mapping[str, Any] = field(default_factory=dict)  # for programs


def verdict(rows: list[Diagnosis]) -> str:
    """The last line: whether a run can start, and if not, why."""
    wrong = [row.what for row in rows if row.state is State.WRONG]
    if wrong:
        return f"not ready: {', '.join(dict.fromkeys(wrong))}"
    gigabytes = sum(row.numbers.get("download_gb", 0.0) for row in rows)
    if any(row.state is State.DOWNLOAD for row in rows):
        return f"ready, after downloads of about {gigabytes:.2g} GB"
    return "ready"
