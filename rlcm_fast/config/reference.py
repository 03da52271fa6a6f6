"""Writes docs/config.md and its second half: every field of a config with its type, default, range and meaning.

python -m rlcm_fast.config.reference docs
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml
from docstring_parser import parse_from_object

from rlcm_fast.config import Config
from rlcm_fast.config.marks import marks_of
from rlcm_fast.config.ranges import Range

_HEAD = """# Every field of a config: {title}

*{question}*

`python -m rlcm_fast.config.reference docs` writes this page from the dataclasses in `rlcm_fast/config/`; a test checks
that it is current. The other fields are in [{other}]({other}).

Write a field of a section as `--section.field VALUE` on the command line, and as an indented line in YAML. Several
`--config` files and options override each other from left to right. `rlcm-fast configs` lists the configs that ship.
"""
_PAGES = {
    "config.md": (
        "the run, its model and its data",
        "Which fields say what is trained, on which prompts and for which rewards, with which types and defaults?",
    ),
    "config_training.md": (
        "training",
        "Which fields say how a run draws, learns, saves and logs, with which types and defaults?",
    ),
}
_ABOUT_DATA = ("model", "lora", "policy", "prompts", "rewards", "tasks", "pretraining", "evaluation")
_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", dict: "mapping"}


def pages() -> dict[str, str]:
    """Returns the text of each page, by its file name."""
    first, second = _PAGES
    return {first: _page(first, second, True), second: _page(second, first, False)}


def _page(name: str, other: str, is_about_data: bool) -> str:
    """Returns the page of the sections about data, after the fields of no section; or of all other sections."""
    title, question = _PAGES[name]
    parts = [_HEAD.format(title=title, question=question, other=other)]
    if is_about_data:
        parts += _table("The run", "", Config)
    hints, meanings = get_type_hints(Config), _meanings(Config)
    for item in fields(Config):
        kind = _section_class(hints[item.name])
        if kind is not None and (item.name in _ABOUT_DATA) == is_about_data:
            parts += _table(f"`{item.name}`", meanings[item.name], kind)
    return "\n".join(parts)


def _table(title: str, meaning: str, kind: type) -> Iterator[str]:
    """Yields the heading and the table of a dataclass; a run's sections have tables of their own."""
    yield f"\n## {title}\n"
    if meaning:
        yield f"{meaning[0].upper()}{meaning[1:].rstrip('.')}.\n"
    yield "| field | type | default | meaning |"
    yield "|---|---|---|---|"
    hints, meanings, ranges = get_type_hints(kind), _meanings(kind), marks_of(kind, Range)
    for item in fields(kind):
        if is_dataclass(hints[item.name]):
            continue
        type_name = _type_name(hints[item.name])
        if item.name in ranges:
            type_name = _ranged(type_name, ranges[item.name].shown)
        meaning = meanings[item.name].replace("|", "\\|")
        yield f"| `{item.name}` | {type_name} | {_default(item)} | {meaning} |"


def _ranged(type_name: str, remedy: str) -> str:
    """Returns the type with what is allowed: the remedy of the error message, which may name the type itself."""
    return remedy if remedy.startswith("a ") else f"{type_name}: {remedy}"


def _section_class(hint: Any) -> type | None:
    """Returns the dataclass of a section, or that of the items of a list; None for other fields."""
    items = get_args(hint) if get_origin(hint) is list else (hint,)
    return items[0] if items and is_dataclass(items[0]) and isinstance(items[0], type) else None


def _meanings(kind: type) -> dict[str, str]:
    """Returns the docstring of every field."""
    return {item.arg_name: item.description or "" for item in parse_from_object(kind).params}


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return ", ".join("empty" if choice == "" else f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) is list:
        (item,) = get_args(hint)
        return f"list of {'lists' if get_origin(item) is list else _NAMES.get(item, 'mappings')}"
    if get_origin(hint) is tuple:
        return "list of number"
    if not get_args(hint):
        return "null" if hint is type(None) else _NAMES[hint]
    return " or ".join(_type_name(part) for part in get_args(hint))


def _default(item: Field[Any]) -> str:
    if item.default is MISSING and item.default_factory is MISSING:
        return "required"
    value = item.default if item.default_factory is MISSING else item.default_factory()
    if isinstance(value, list) and value and is_dataclass(value[0]):
        value = [{"name": reward.name} for reward in value]
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


if __name__ == "__main__":
    for file_name, text in pages().items():
        (Path(sys.argv[1]) / file_name).write_text(text, encoding="utf-8")
