"""Words the mistakes in a YAML file or on the command line for the person who made them.

jsonargparse checks types and merges. This file finds unknown keys first, so that the message can name the closest known
key, and turns jsonargparse's messages into one line. It knows only the dataclass of the config. It also corrects input:
it drops the launcher's option and completes bare switches (`split_arguments`). It writes out every field of list items
(`read_file`, `complete_items`), because jsonargparse would take a missing field from the item that an earlier file has
in the same place. And it resolves files that a YAML file names relative to itself (`read_file`).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from rlcm_fast.config.documents import MOST_CHARACTERS, Unreadable, load
from rlcm_fast.config.files import RESOLVED, MayBeFile, beside, find_config
from rlcm_fast.config.marks import marks_of, types_of
from rlcm_fast.config.other_words import meaning_of

_HELP = "--help lists every field"
_MOST_BITS = 10_000  # of a whole number; Python does not write larger ones as text
_OUTSIDE_CONFIG = {"--config", "--help", "-h"}


def split_arguments(argv: Sequence[str], config_class: type) -> tuple[list[str], list[str]]:
    """Returns (config files, other arguments); drops the launcher's --local_rank and sets bare switches to true."""
    switches = {f"--{name}" for name, hint in fields_of(config_class) if hint is bool}
    files, arguments, rest = [], [], list(argv)
    while rest:
        name, has_value, value = rest.pop(0).partition("=")
        follows = bool(rest) and not rest[0].startswith("--")
        if name in ("--local_rank", "--local-rank"):
            if not has_value and follows:
                rest.pop(0)
        elif name == "--config":
            if not has_value and not follows:
                raise ValueError("--config needs a YAML file, or a name, for example --config shapes/compressibility")
            files.append(value if has_value else rest.pop(0))
        elif name in switches and not has_value and not follows:
            arguments.append(f"{name}=true")
        else:
            arguments.append(name + has_value + value)
    return files, arguments


def read_file(file: str, config_class: type) -> str:
    """Returns the content of a YAML file as JSON, with complete list items and paths from the current folder.

    Raises ValueError unless it is a mapping with known keys only.
    """
    path = find_config(file)
    text = _text_of(path, file)
    try:
        content = load(text)
    except Unreadable as error:
        raise ValueError(f"config={file} {error}; {error.remedy or 'correct that line'}") from error
    if not isinstance(content, dict):
        raise ValueError(f"config={file} holds no fields; write lines like 'seed: 0', or leave --config out")
    _check_keys(content, config_class, "", f" in {file}")
    _check_numbers(content, "", f" in {file}")
    return _to_json(_complete_fields(content, config_class, None if text.startswith(RESOLVED) else path.parent))


def _text_of(path: Path, file: str) -> str:
    """Returns the text of a config's file; raises ValueError if it cannot be read."""
    most = 4 * MOST_CHARACTERS
    try:
        size = path.stat().st_size
        if size > most:
            raise ValueError(f"config={file} has {size:,} bytes, and no config needs more than {most:,}; shorten it")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"config={file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(
            f"config={file} cannot be read ({error.strerror}); give another, or change its rights"
        ) from error


def check_arguments(arguments: Sequence[str], config_class: type) -> None:
    """Raises ValueError for an option that is not a field, or a list of rewards with an unknown key."""
    known = dict(fields_of(config_class))
    helps = {f"{name}.help" for name, hint in known.items() if _item_class(hint)}
    option = ""
    for argument in arguments:
        is_option = argument.startswith("--")
        if not is_option and argument not in _OUTSIDE_CONFIG and not option:
            raise ValueError(f"{argument} belongs to no option; write --field value, and quote values with spaces")
        name, has_value, value = argument.removeprefix("--").partition("=")
        if is_option and argument not in _OUTSIDE_CONFIG and name.rstrip("+") not in known | dict.fromkeys(helps):
            raise ValueError(f"--{name} is no field of the config; {_meant(name, list(known), '--')}{_HELP}")
        text = value if has_value else "" if is_option else argument
        field = name if is_option else option
        hint = known.get(field.rstrip("+"))
        if text and hint is not None and str not in (hint, *typing.get_args(hint)):
            _check_text(field, text, _item_class(hint))
        option = "" if has_value or not is_option else name


def options_of(overrides: Mapping[str, Any], config_class: type) -> list[str]:
    """Returns the command line of keywords written section__field, as update__clip_range=2e-4.

    Raises ValueError for a keyword that is no field.
    """
    known = {name.replace(".", "__"): name for name, _ in fields_of(config_class)}
    sections = {name.partition("__")[0] for name in known if "__" in name}
    options = []
    for keyword, value in overrides.items():
        if keyword in sections:
            raise ValueError(f"{keyword} is a section; write its fields as {keyword}__FIELD=VALUE")
        if keyword not in known:
            near = _closest(keyword.replace("__", "."), list(known.values())).replace(".", "__")
            raise ValueError(
                f"{keyword} is no field of the config; {near}write SECTION__FIELD; docs/config.md lists them"
            )
        options.append(f"--{known[keyword]}={_option_text(keyword, value)}")
    return options


def _option_text(keyword: str, value: Any) -> str:
    """Returns a value as the command line has it."""
    if isinstance(value, str | Path):
        return str(value)
    try:
        return json.dumps(value)
    except TypeError as error:
        kind = type(value).__name__
        raise ValueError(
            f"{keyword}={value} is a {kind}; give a number, a text, a list or a mapping of those"
        ) from error


def complete_items(arguments: Sequence[str], config_class: type) -> list[str]:
    """Returns the arguments with complete list items."""
    known = dict(fields_of(config_class))
    completed: list[str] = []
    option = ""
    for argument in arguments:
        head, equals, text = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        option = head.removeprefix("--") or option
        item_class = _item_class(known.get(option))  # not of --rewards+, which adds items
        if item_class and text:
            text = _to_json(_complete(load(text), item_class, None))
        completed.append(head + equals + text)
    return completed


def _complete_fields(node: dict[str, Any], config_class: type, folder: Path | None) -> dict[str, Any]:
    """Returns the fields of a section with complete list items; files in `folder` become paths."""
    hints, sources = types_of(config_class), marks_of(config_class, MayBeFile)
    completed = dict(node)
    for key, value in node.items():
        item_class = _item_class(hints[key])
        if item_class:
            completed[key] = _complete(value, item_class, folder)
        elif dataclasses.is_dataclass(hints[key]):
            completed[key] = _complete_fields(value, hints[key], folder)
        elif key in sources and folder is not None and isinstance(value, str):
            completed[key] = beside(folder, value)
    return completed


def _complete(items: list[dict[str, Any]], item_class: type, folder: Path | None) -> list[dict[str, Any]]:
    """Returns the items with every field; defaults fill in what an item leaves out."""
    defaults: dict[str, Any] = {}
    for item in dataclasses.fields(item_class):
        if item.default is not dataclasses.MISSING:
            defaults[item.name] = item.default
        elif item.default_factory is not dataclasses.MISSING:
            defaults[item.name] = item.default_factory()
    return [{**defaults, **_complete_fields(item, item_class, folder)} for item in items]


def _to_json(content: Any) -> str:
    return json.dumps(content, default=str)  # a date, which YAML makes of 2026-11-22, as it was written


def explain(message: str, prefix: str = "") -> str:
    """Returns jsonargparse's message as one line: field=value, what was expected, the way out."""
    found = re.match(r'Parser key "(?P<field>[^"]+)":\s*(?P<rest>.*)', message, re.DOTALL)
    if not found:
        return f"{_one_line(message)}; {_HELP}"
    field, rest = prefix + found["field"], found["rest"]
    several = re.match(r".* Subtypes: \[(?P<types>.*)\]\s*Errors:.*Given value: (?P<value>.*)", rest, re.DOTALL)
    if several:
        kinds = re.findall(r"<class '\w+'>|typing\.\w+(?:\[[^]]*\])?|list\[\w+\]", several["types"])
        words = " or ".join(_in_words(kind).removeprefix("one of ") for kind in kinds)
        return f"{field}={_one_line(several['value'])} is not allowed; give {words}"
    expected = re.match(r"Expected (?:a|an) (?P<type>.*?)\. Got value: (?P<value>.*)", rest, re.DOTALL)
    if not expected:
        return f"{field}: {_one_line(rest)}; {_HELP}"
    return f"{field}={_one_line(expected['value'])} is not allowed; give {_in_words(expected['type'])}"


def fields_of(config_class: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted name, type) of every field below, without sections."""
    for name, hint in types_of(config_class).items():
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from fields_of(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _check_keys(node: dict[Any, Any], config_class: type, prefix: str, where: str) -> None:
    hints = types_of(config_class)
    for key, value in node.items():
        name = f"{prefix}{key}"
        if key not in hints:
            known = list(hints) if prefix else [*hints, *dict(fields_of(config_class))]
            remedy = "write its section, and the field indented below it; " if "." in str(key) else ""
            raise ValueError(f"{name}{where} is no field of the config; {remedy or _meant(str(key), known)}{_HELP}")
        hint = hints[key]
        if value is None and type(None) not in typing.get_args(hint):
            raise ValueError(f"{name}={value}{where} has no value; give one or leave the line out")
        item_class = _item_class(hint)
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            if not isinstance(value, dict):
                raise ValueError(f"{name}={value}{where} is a section; indent its fields below it or leave it out")
            _check_keys(value, hint, f"{name}.", where)
        elif item_class:
            _check_items(value, item_class, name, where)


def _check_items(value: Any, item_class: type, name: str, where: str) -> None:
    required = [f.name for f in dataclasses.fields(item_class) if f.default is f.default_factory]
    remedy = f"write a list of {{{', '.join(f.name + ': ...' for f in dataclasses.fields(item_class))}}}"
    if not isinstance(value, list):
        raise ValueError(f"{name}={value}{where} is not a list; {remedy}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise ValueError(f"{name}[{index}]={item}{where} is not a mapping; {remedy}")
        _check_keys(item, item_class, f"{name}[{index}].", where)
        missing = [key for key in required if key not in item]
        if missing:
            raise ValueError(f"{name}[{index}]{where} lacks {missing[0]}; {remedy}")
        _check_types(item, item_class, f"{name}[{index}].")


def _check_types(item: dict[str, Any], item_class: type, prefix: str) -> None:
    """Checks one item at a time, because jsonargparse's message about a list does not name the item."""
    hints = types_of(item_class)
    parser = ArgumentParser(exit_on_error=False)
    for key in item:
        parser.add_argument(f"--{key}", type=hints[key])
    try:
        parser.parse_object(json.loads(_to_json(item)))
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error), prefix)) from error


def _check_text(field: str, text: str, item_class: type | None) -> None:
    """Checks the value of an option that is no text, before jsonargparse reads it: its YAML, its numbers, its items."""
    try:
        value = load(text)
    except Unreadable as error:
        if not error.remedy and not item_class:
            return  # jsonargparse says better what the field takes
        raise ValueError(f"{field}={text} {error}; {error.remedy or 'quote it for the shell'}") from error
    if item_class:
        _check_items([value] if field.endswith("+") and isinstance(value, dict) else value, item_class, field, "")
    _check_numbers(value, field, "")


def _check_numbers(value: Any, name: str, where: str) -> None:
    """Refuses numbers that are not finite, or that no field can hold, with their place."""
    if isinstance(value, dict):
        for key, part in value.items():
            _check_numbers(part, f"{name}.{key}" if name else str(key), where)
    elif isinstance(value, list):
        for index, part in enumerate(value):
            _check_numbers(part, f"{name}[{index}]", where)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name}={value}{where} is out of range; give a finite number")
    elif isinstance(value, int) and value.bit_length() > _MOST_BITS:
        raise ValueError(f"{name} has a number of {value.bit_length()} bits{where}, and is out of range; give less")


def _item_class(hint: Any) -> type | None:
    """Returns the dataclass D of list[D], or None."""
    items = typing.get_args(hint) if typing.get_origin(hint) is list else ()
    return items[0] if items and dataclasses.is_dataclass(items[0]) and isinstance(items[0], type) else None


def _meant(name: str, known: list[str], dashes: str = "") -> str:
    """Returns what somebody may have meant by a name: a section, the word of another tool, or a name that is close."""
    fields = [field for field in known if field.startswith(f"{name}.")]
    if fields:
        return f"it is a section: write one of its fields, as {dashes}{fields[0]}; "
    ours = meaning_of(name.rpartition(".")[2])
    return f"here it is {ours}; " if ours else _closest(name, known, dashes)


def _closest(name: str, known: list[str], dashes: str = "") -> str:
    """Returns 'did you mean ...? ', by the whole name or its last part; empty if no name is close."""
    leaves = {}
    for candidate in known:
        leaves.setdefault(candidate.rpartition(".")[2], candidate)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
    if not near:
        near = [leaves[leaf] for leaf in difflib.get_close_matches(name.rpartition(".")[2], list(leaves), n=1)]
    return f"did you mean {dashes}{near[0]}? " if near else ""


def _in_words(type_text: str) -> str:
    words = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "a text"}
    words |= {"NoneType": "null", "list": "a list", "tuple": "a list", "dict": "a mapping like {key: value}"}
    plain = re.sub(r"<class '([\w.]+)'>", lambda m: words.get(m[1], m[1]), _one_line(type_text))
    choices = re.fullmatch(r"typing\.Literal\[(.*)\]", plain)
    if not choices:
        return re.sub(r"^list\[\w+\]$", "a list", plain.replace("typing.", ""))
    names = choices[1].replace("'", "").split(", ")
    return "one of " + ", ".join(filter(None, names)) + (", or leave it out" if "" in names else "")


def _one_line(text: str) -> str:
    return " ".join(text.split())
