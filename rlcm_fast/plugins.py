"""Loads classes and functions that a text names, as "package.module:Class" or by a built-in alias."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from typing import Any


def load_class(name: str, aliases: Mapping[str, str] | None = None, field: str = "name") -> Any:
    """The class or function that `name` names; `aliases` maps built-in names to "package.module:Class".

    Raises ValueError with `field` and the way out. An exception that the module itself raises at import passes through.
    """
    # Import the module.
    target = (aliases or {}).get(name, name)
    module_name, colon, attribute = target.partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{field}={name} is not known; {_remedy(name, aliases or {})}")
    _require_module(f"{field}={name}", module_name)
    value: Any = importlib.import_module(module_name)

    # Look up the attribute in it, part by part.
    for part in attribute.split("."):
        if not hasattr(value, part):
            known = [key for key, item in vars(value).items() if isinstance(item, Callable) and key[0] != "_"]
            near = difflib.get_close_matches(part, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "define it there"
            raise ValueError(f"{field}={name}: {module_name} has no {part}; {hint}")
        value = getattr(value, part)
    if not callable(value):
        raise ValueError(f"{field}={name} is a {type(value).__name__}; name a class")
    return value


def build(
    name: str, arguments: Mapping[str, Any], aliases: Mapping[str, str] | None = None, field: str = "name"
) -> Any:
    """An instance of the class that `name` names, made with keyword `arguments`; raises what `load_class` raises.

    If the class raises a ValueError or TypeError, the ValueError from here puts `field` and the arguments in front.
    """
    factory = load_class(name, aliases, field)
    signature = inspect.signature(factory)
    where = f"{field}={name} arguments={dict(arguments)}"
    try:
        signature.bind(**arguments)
    except TypeError as error:
        accepted = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        raise ValueError(f"{where}: {error}; it accepts {accepted}") from error
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _require_module(what: str, module_name: str) -> None:
    try:
        found = importlib.util.find_spec(module_name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        found = False
    if not found:
        raise ValueError(f"{what}: no module {module_name}; install its package, or put its folder on PYTHONPATH")


def _remedy(name: str, aliases: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, list(aliases), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = f"known: {', '.join(aliases)}; or write" if aliases else "write"
    return f"{hint}{known} package.module:Class"
