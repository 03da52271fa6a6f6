"""Tables of what a run was: the fields of its config that differ from its base and from the defaults, its environment.

The base is the file that the run's command named with --config, if it is still there; a run's config.yaml holds the
result alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from typing import Any

from rlcm_fast.config import Config, RewardConfig, TaskConfig, parse_config, to_dict
from rlcm_fast.report.reading import RunData, flat

_ABSENT = "-"


@dataclass(frozen=True)
class Setting:
    """A field of the config."""

    name: str
    values: Sequence[str]  # this run's, the base's if it is known, the default
    is_changed: bool  # differs from the base


@dataclass(frozen=True)
class Settings:
    """The fields that differ from the defaults or from the base."""

    columns: Sequence[str]
    rows: Sequence[Setting]
    base: str  # what it is called; empty if it is not known


def settings(run: RunData) -> Settings:
    """Compares the run's config with its base and with the defaults."""
    defaults, base, name = flat(to_dict(Config())), *_base(run)
    if not run.config:
        return Settings([], [], "")
    rows = []
    names: dict[str, None] = dict.fromkeys(run.config) | dict.fromkeys(base or {})
    for field in names:
        value, default = run.config.get(field), defaults.get(field, _ABSENT)
        of_base = default if base is None else base.get(field, default)
        if value == default == of_base:
            continue
        shown = [value, default] if base is None else [value, of_base, default]
        rows.append(Setting(field, [text_of(item) for item in shown], value != of_base))
    columns = ["this run", "default"] if base is None else ["this run", name, "default"]
    return Settings(columns, sorted(rows, key=lambda row: not row.is_changed), name)


def differing(runs: Sequence[RunData]) -> list[tuple[str, list[str]]]:
    """Returns the fields that are not the same in all runs, with the value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = []
    for name in names:
        values = [text_of(run.config.get(name, _ABSENT)) for run in runs]
        if len(set(values)) > 1:
            found.append((name, values))
    return found


def environment(run: RunData) -> list[tuple[str, str]]:
    """Returns the environment as rows, packages one by one."""
    rows = []
    for name, value in run.environment.items():
        if isinstance(value, Mapping):
            rows += [(f"{name}: {key}", text_of(item)) for key, item in value.items()]
        elif name == "command" and isinstance(value, list):
            rows.append((name, " ".join(map(str, value))))
        else:
            rows.append((name, text_of(value)))
    return rows


def text_of(value: Any) -> str:
    """Returns a value as YAML writes it in one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(item, Mapping) and "name" in item for item in value):
        return ", ".join(map(_named, value))
    return json.dumps(value, default=str)


def _named(item: Mapping[str, Any]) -> str:
    """Returns a reward or a task as its name and what is not at its default: shapes_alignment (weight 0.25)."""
    kind = TaskConfig if "source" in item else RewardConfig
    usual = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    more = [
        f"{key} {text_of(value)}"
        for key, value in item.items()
        if key != "name" and (key not in usual or value != usual[key]) and value not in ({}, [], None)
    ]
    return f"{item['name']} ({', '.join(more)})" if more else str(item["name"])


def _base(run: RunData) -> tuple[dict[str, Any] | None, str]:
    """Returns the fields of the config files that the command named, and their names; None if they are not known."""
    command = run.environment.get("command")
    names = _config_files([str(word) for word in command]) if isinstance(command, list) else []
    base = _fields_of(tuple(names))
    return (None, "") if base is None else (base, " + ".join(names))


@lru_cache  # reading a config takes 0.3 s, and a report that is renewed during a run asks for the same one
def _fields_of(names: tuple[str, ...]) -> dict[str, Any] | None:
    """Returns the fields of config files that are put on top of each other; None if one cannot be read any more."""
    if not names:
        return None
    try:
        return flat(to_dict(parse_config([f"--config={name}" for name in names])))
    except (ValueError, OSError):  # a file is gone, or another version wrote it
        return None


def _config_files(command: Sequence[str]) -> list[str]:
    names = []
    for word, following in zip(command, [*command[1:], ""], strict=True):
        if word == "--config" and following:
            names.append(following)
        elif word.startswith("--config="):
            names.append(word.partition("=")[2])
    return names
