"""What a dataclass says of its fields: their types, and the marks beside them, which `Annotated[float, mark]` adds.

Python strips a mark wherever it is not asked for, so that to the parser the field is a plain float.
"""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar, get_type_hints

Mark = TypeVar("Mark")


@cache
def types_of(config_class: type) -> dict[str, Any]:
    """The types of the fields, without marks."""
    return get_type_hints(config_class)


@cache
def marks_of(config_class: type, kind: type[Mark]) -> dict[str, Mark]:
    """The marks of one kind, by the field that has one."""
    hints = get_type_hints(config_class, include_extras=True)
    every = {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
    return {name: mark for name, marks in every.items() for mark in marks if isinstance(mark, kind)}
