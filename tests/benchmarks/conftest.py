"""What tests of benchmarks/learning/ share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "learning"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module of benchmarks/learning/, found as a script finds what lies beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module
