"""What tests of benchmarks/learning/ share."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    """A module of benchmarks/, by its room and name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")
