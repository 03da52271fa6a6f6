"""Loads classes and functions that a text names, as "package.module:Class" or by a built-in alias.

Whatever a plug-in's module, constructor or function raises becomes a ValueError of one line, with the place in the
plug-in; only a Fault and a lack of memory pass through, because they are no mistake in it.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rlcm_fast.faults import Fault, origin_of, summary_of
from rlcm_fast.patience import NotDone
from rlcm_fast.permission import check_may_be_named, check_module, find_unimported


def load_class(name: str, aliases: Mapping[str, str] | None = None, field: str = "name") -> Any:
    """The class or function that `name` names; `aliases` maps built-in names to "package.module:Class".

    What is no alias must say that a config may name it (permission.py). Raises ValueError with `field` and the way out,
    also for whatever the module itself raises at import.
    """
    # Import the module.
    module_name, attribute = _parts(name, aliases or {}, field)
    _require_module(f"{field}={name}", module_name)
    with worded(f"{field}={name}: importing {module_name}", "repair the module"):
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
    if name not in (aliases or {}):
        check_may_be_named(value, f"{field}={name}")
    return value


def check_unimported(name: str, aliases: Mapping[str, str], field: str) -> str | None:
    """Checks a name as far as it goes without importing its module, for a dry run.

    Returns "MODULE of FILE", which a run would import; None for a built-in name. Raises ValueError as `load_class`.
    """
    module_name, attribute = _parts(name, aliases, field)
    if name in aliases:
        return None
    return f"{module_name} of {find_unimported(module_name, attribute, f'{field}={name}')}"


def _parts(name: str, aliases: Mapping[str, str], field: str) -> tuple[str, str]:
    """Returns the module and the attribute that a name means; raises ValueError if it can be no name of a plug-in."""
    module_name, colon, attribute = aliases.get(name, name).partition(":")
    if not (module_name and colon and attribute):
        raise ValueError(f"{field}={name} is not known; {_remedy(name, aliases)}")
    if not all(part.isidentifier() for part in (*module_name.split("."), *attribute.split("."))):
        raise ValueError(f"{field}={name} is no name of Python; {_remedy(name, aliases)}")
    if name not in aliases:
        check_module(module_name, f"{field}={name}")
    return module_name, attribute


def build(
    name: str, arguments: Mapping[str, Any], aliases: Mapping[str, str] | None = None, field: str = "name"
) -> Any:
    """An instance of the class that `name` names, made with keyword `arguments`; raises what `load_class` raises.

    Whatever the class raises becomes a ValueError with `field` and the arguments in front.
    """
    factory = load_class(name, aliases, field)
    where = f"{field}={name} arguments={dict(arguments)}"
    check_accepts(factory, where, keywords=arguments)
    if name in (aliases or {}):
        check_types(factory, where, arguments)
    try:
        return factory(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error
    except _PASS:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where}: it raised {_told(error)}; repair the class, or its arguments") from error


def check_accepts(
    function: Callable[..., Any],
    where: str,
    positional: tuple[str, ...] = (),
    keywords: Mapping[str, Any] | None = None,
) -> None:
    """Refuses arguments that a function or a class cannot be called with; calls nothing.

    positional: the names of positional arguments, for the message. Raises ValueError that begins with `where`.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, without a signature: the call itself shows what it accepts
        return
    try:
        signature.bind(*positional, **(keywords or {}))
    except TypeError as error:
        accepted = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        called = f" as it is called with ({', '.join(positional)})" if positional else ""
        raise ValueError(f"{where}: {error}{called}; it accepts {accepted}") from error


def check_types(function: Callable[..., Any], where: str, keywords: Mapping[str, Any]) -> None:
    """Refuses arguments of another type than a built-in class or function says; begins with `where`.

    A number with a point is no whole number, and true is no number. Other types than those of YAML pass.
    """
    called = function.__init__ if isinstance(function, type) else function
    hints = typing.get_type_hints(called)
    for name, value in keywords.items():
        if name not in hints or _fits(value, hints[name]):
            continue
        default = inspect.signature(function).parameters[name].default
        has_example = default not in (inspect.Parameter.empty, None, "") and not isinstance(default, bool)
        example = f", as {default}" if has_example else ""
        raise ValueError(f"{where}: {name}={value} is not allowed; give {_in_words(hints[name])}{example}")


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Returns the types of a union, of Literal the types of its values, of list[X] only list."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for part in typing.get_args(hint) for kind in _kinds(part))
    if origin is typing.Literal:
        return tuple(dict.fromkeys(type(value) for value in typing.get_args(hint)))  # the class says which values
    return (origin or hint,)


def _fits(value: Any, hint: Any) -> bool:
    """Tells whether a value is of a type; of types that YAML does not have, every value is."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    fits = {
        int: is_number and isinstance(value, numbers.Integral),
        float: is_number and math.isfinite(value),
        bool: isinstance(value, bool),
        str: isinstance(value, str | os.PathLike),
        Sequence: isinstance(value, Sequence) and not isinstance(value, str),
        Mapping: isinstance(value, Mapping),
        type(None): value is None,
    }
    return any(fits.get(kind, True) for kind in _kinds(hint))


def _in_words(hint: Any) -> str:
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    words |= {Sequence: "a list", Mapping: "a mapping", type(None): "null"}
    return " or ".join(words[kind] for kind in _kinds(hint))


@contextmanager
def worded(where: str, remedy: str) -> Iterator[None]:
    """Turns whatever a plug-in raises in the block into a ValueError of one line: where, what, at which line of it."""
    try:
        yield
    except _PASS:
        raise
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} raised {_told(error)}; {remedy}") from error


_PASS = (Fault, MemoryError, NotDone)


def _told(error: BaseException) -> str:
    """Returns what an error of a plug-in says and where it was raised; a syntax error says that itself."""
    place = "" if isinstance(error, SyntaxError) else f" (at {origin_of(error)})"
    return f"{summary_of(error)}{place}"


def _require_module(what: str, module_name: str) -> None:
    try:
        found = importlib.util.find_spec(module_name) is not None
    except (ImportError, ValueError):  # a parent package is missing, or the name has dots in strange places
        found = False
    if not found:
        raise ValueError(f"{what}: no module {module_name}; install its package, or put its folder on PYTHONPATH")


def _remedy(name: str, aliases: Mapping[str, str]) -> str:
    near = difflib.get_close_matches(name, list(aliases), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    known = f"known: {', '.join(aliases)}; or write" if aliases else "write"
    return f"{hint}{known} package.module:Class"
