"""Reads YAML that anybody may have written: each key once, no deep nesting, no bombs, in a second at most.

PyYAML lets the last of two equal keys win, follows nesting until Python's stack is full, and expands aliases without an
end. It reads 1e-4 as a text; YAML 1.2 and jsonargparse read a number.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from rlcm_fast.config.files import is_text

MOST_CHARACTERS = 200_000
"""Characters of a document; a config of a hundred tasks has 40,000, and PyYAML reads 200,000 in about a second."""
MOST_DEPTH = 32
"""Levels of nesting; a config has 7, and PyYAML goes down by recursion."""
MOST_VALUES = 20_000
"""Values of a document with all its aliases written out; a config has some hundred."""


class Unreadable(ValueError):
    """A text that is no YAML for us: what is wrong, and the way out where it is known."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class _Loader(yaml.SafeLoader):
    """Reads 1e-4 as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load(text: str) -> Any:
    """Returns what a YAML document holds; raises Unreadable."""
    if len(text) > MOST_CHARACTERS:
        raise Unreadable(
            f"has {len(text):,} characters, and no config needs more than {MOST_CHARACTERS:,}", "shorten it"
        )
    try:
        _check_depth(text)
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_size(node)
        return loader.construct_document(node)
    except Unreadable:
        raise
    except RecursionError as error:
        raise Unreadable("nests its aliases too deeply", "write it without them") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:  # as of a date of month 13
        raise Unreadable(f"is not YAML: {' '.join(str(error).split())}") from error


def _check_depth(text: str) -> None:
    """Refuses deep nesting; the events of a document come without recursion."""
    depth = 0
    for event in yaml.parse(text, _Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise Unreadable(
                f"is nested more than {MOST_DEPTH} deep, in line {event.start_mark.line + 1}", "flatten it"
            )


def _check_size(root: yaml.Node) -> None:
    """Refuses keys that stand twice, and aliases that grow beyond all bounds or hold themselves."""
    sizes: dict[int, int] = {}  # by the id of a node; 0 while its parts are counted

    def size_of(node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            if not is_text(node.value):
                raise Unreadable(f"has half a character, in line {_line(node)}", "write it whole")
            return 1
        if id(node) in sizes:
            if sizes[id(node)] == 0:
                raise Unreadable(f"has an alias inside of itself, in line {_line(node)}", "write it out")
            return sizes[id(node)]
        sizes[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            parts = [part for pair in node.value for part in pair]
        else:
            parts = node.value
        sizes[id(node)] = 1 + sum(map(size_of, parts))
        if sizes[id(node)] > MOST_VALUES:
            raise Unreadable(f"holds more than {MOST_VALUES:,} values, its aliases written out", "write less")
        return sizes[id(node)]

    size_of(root)


def _check_keys(node: yaml.MappingNode) -> None:
    lines: dict[Hashable, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        name = (key.tag, key.value)
        if name in lines:
            raise Unreadable(f"has {key.value} twice, in lines {lines[name]} and {_line(key)}", "leave one out")
        lines[name] = _line(key)


def _line(node: yaml.Node) -> int:
    return node.start_mark.line + 1
