"""Reads the types of a dataclass's fields and the marks beside them, which `Annotated[float, mark]` adds.

Python drops marks unless you ask for them, so the parser sees a plain float. `OrWord` alone changes a type: the parser
accepts a word beside the number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, get_type_hints

Mark = TypeVar("Mark")


@dataclass(frozen=True)
class OrWord:
    """Marks a number for which a config may have a word; a number takes its place before anything computes with it."""

    word: str


@cache
def types_of(config_class: type) -> dict[str, Any]:
    """Returns the types of the fields, without marks."""
    words = marks_of(config_class, OrWord)
    hints = get_type_hints(config_class)
    return {name: hint | Literal[words[name].word] if name in words else hint for name, hint in hints.items()}


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
