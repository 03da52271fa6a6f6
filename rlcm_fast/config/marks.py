"""Reads the types of a dataclass's fields and the marks beside them, which `Annotated[float, mark]` adds.

Python drops marks unless you ask for them, so the parser sees a plain float.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, get_type_hints

Mark = TypeVar("Mark")


@cache
def types_of(config_class: type) -> dict[str, Any]:
    """Returns the types of the fields, without marks."""
    return get_type_hints(config_class)


@cache
def marks_of(config_class: type, kind: type[Mark]) -> dict[str, Mark]:
    """Returns the marks of one kind, by field."""
    hints = get_type_hints(config_class, include_extras=True)
    every = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    found = {}
    for name, marks in every.items():
        for mark in marks:
            if isinstance(mark, kind):
                found[name] = mark
    return found
