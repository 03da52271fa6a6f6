"""Reads files and a command line into a dataclass of typed sections: defaults < YAML files < dotted overrides.

It knows only the dataclass of the config, whose docstrings are the texts of --help.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast

from docstring_parser import parse_from_object
from jsonargparse import ActionConfigFile, ArgumentParser

from rlcm_fast.config.marks import marks_of, types_of
from rlcm_fast.config.mistakes import check_arguments, complete_items, explain, read_file, split_arguments
from rlcm_fast.config.ranges import Range

_CONFIG_HELP = "YAML file, or the name of a config that ships, as `rlcm-fast configs` lists them; options override it"

ConfigClass = TypeVar("ConfigClass")


def parse(argv: Sequence[str], config_class: type[ConfigClass]) -> ConfigClass:
    """Merges defaults < the files of `--config`, in order < dotted overrides anywhere on the command line.

    Raises ValueError with one line: the field, its value and the way out. `--local_rank=N` of the launcher is ignored.
    """
    files, arguments = split_arguments(argv, config_class)
    contents = [read_file(file, config_class) for file in files]
    check_arguments(arguments, config_class)
    parser = parser_of(config_class)
    try:
        options = complete_items(arguments, config_class)
        parsed = parser.parse_args([*(f"--config={content}" for content in contents), *options])
        return _build(config_class, parser.instantiate(parsed))
    except argparse.ArgumentError as error:
        raise ValueError(explain(str(error))) from error


def parser_of(config_class: type) -> ArgumentParser:
    """Returns the parser behind `--help`: one group per section, one dotted option per field.

    A field's help is its docstring, and in brackets which numbers it may have.
    """
    parser = ArgumentParser(
        prog="train.py",
        usage="deepspeed rlcm_fast/train.py [--config FILE] [--section.field VALUE ...]",
        description="Fine-tune a few-step text-to-image model with reinforcement learning on any reward.",
        exit_on_error=False,
        allow_abbrev=False,
        print_config=None,
    )
    parser.add_argument("--config", action=ActionConfigFile, metavar="FILE", help=_CONFIG_HELP)
    _add_fields(parser, parser.add_argument_group("run"), config_class, "")
    return parser


def _add_fields(parser: ArgumentParser, group: Any, config_class: type, prefix: str) -> None:
    help_texts, hints, ranges = _help_texts(config_class), types_of(config_class), marks_of(config_class, Range)
    for item in fields(config_class):
        hint, text = hints[item.name], help_texts[item.name]
        if item.name in ranges:
            text = f"{text} [{ranges[item.name].shown}]"
        if is_dataclass(hint):
            section = parser.add_argument_group(f"{item.name}: {text}")
            _add_fields(parser, section, cast(type, hint), f"{prefix}{item.name}.")
        else:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            group.add_argument(f"--{prefix}{item.name}", type=hint, default=default, help=text)


@cache
def _help_texts(config_class: type) -> dict[str, Any]:
    """Reads the docstrings of the fields from the source, by field."""
    return {item.arg_name: item.description for item in parse_from_object(config_class).params}


def _build(config_class: type, values: Any) -> Any:
    """Builds the sections from the parser's nested namespaces, whose leaves already have their types."""
    hints = types_of(config_class)
    arguments = {item.name: values[item.name] for item in fields(config_class)}
    return config_class(**{k: _build(hints[k], v) if is_dataclass(hints[k]) else v for k, v in arguments.items()})
