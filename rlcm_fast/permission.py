"""Tells what a config may name: classes with a `scope`, and what its author has marked with `plug_in`.

A config may come from a stranger, and text such as os:system must not become a call. So a class or function that a
config names has to say of itself that it was made for that; nothing else is called. Modules of Python's standard
library hold no plug-ins, so they are not even imported. A dry run imports no module: it reads the source instead.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

_MARK = "rlcm_fast_plug_in"
_SCOPES = ("image", "set")
_MAKERS = {"globals", "locals", "vars", "setattr", "exec", "eval", "sys"}  # by these a module can make any name
_WAY_OUT = "put @plug_in (from rlcm_fast import plug_in) above it"
_WAY_OUT_OF_CLASS = f'give it scope = "image" (or "set"), or {_WAY_OUT}'


def plug_in(value: T) -> T:
    """Marks a class or function of yours, so that a config may name it; returns it unchanged otherwise.

    Without this import, the line `my_function.rlcm_fast_plug_in = True` below it does the same.
    """
    setattr(value, _MARK, True)
    return value


def check_may_be_named(value: Any, where: str) -> None:
    """Raises ValueError, which begins with `where`, unless a class or function says that a config may name it.

    Nothing of `value` runs: attributes are looked up without descriptors and without `__getattr__`.
    """
    is_marked = inspect.getattr_static(value, _MARK, False) is True
    if not is_marked and not (isinstance(value, type) and inspect.getattr_static(value, "scope", None) in _SCOPES):
        raise _unmarked(where, isinstance(value, type))


def check_module(module_name: str, where: str) -> None:
    """Raises ValueError, which begins with `where`, if a module is of Python's standard library; imports nothing."""
    top = module_name.partition(".")[0]
    if top in sys.stdlib_module_names and _is_of_python(locate(top)):
        raise ValueError(f"{where}: {top} is of Python's own library, which holds no plug-ins; name a class of yours")


def find_unimported(module_name: str, attribute: str, where: str) -> str:
    """Finds a module and the attribute's definition in its source, imports neither; returns the place of the module.

    Raises:
        ValueError: there is no such module, its source shows that it lacks the attribute, or that nothing marks it.
    """
    # Find the module.
    spec = locate(module_name)
    if spec is None:
        raise ValueError(f"{where}: no module {module_name}; install its package, or put its folder on PYTHONPATH")
    file = Path(spec.origin or "")
    if file.suffix != ".py" or not file.is_file():
        return spec.origin or "a package without a file"

    # Look for the definition; a module may also make its names in ways that only an import shows.
    try:
        body = ast.parse(file.read_bytes()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{where}: {file} is no Python ({reason}); repair it") from error
    statements = list(_at_top(body))
    name = attribute.partition(".")[0]
    found = [statement for statement in statements if name in _names_of(statement)]
    if not found and not any(_may_make_any_name(statement) for statement in statements):
        known = sorted({known for statement in statements for known in _names_of(statement) if known[0] != "_"})
        raise ValueError(f"{where}: {module_name} has no {name}; it has {', '.join(known[:5]) or 'nothing'}")
    if attribute == name and len(found) == 1 and _is_plainly_unmarked(found[0], statements):
        raise _unmarked(where, isinstance(found[0], ast.ClassDef))
    return str(file)


def locate(module_name: str) -> ModuleSpec | None:
    """Returns where a module is, or None if there is none; imports neither it nor its parents where it can."""
    path: Iterable[str] | None = None
    spec = None
    parts = module_name.split(".")
    for number in range(1, len(parts) + 1):
        name = ".".join(parts[:number])
        spec = getattr(sys.modules.get(name), "__spec__", None) or _look_up(name, path)
        if spec is None or (number < len(parts) and spec.submodule_search_locations is None):
            return None
        path = spec.submodule_search_locations
    return spec


def _look_up(name: str, path: Any) -> ModuleSpec | None:
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec = None if find is None else find(name, path)
        except KeyError:  # a namespace package in another one is found only with its parent imported
            return importlib.util.find_spec(name)
        if spec is not None:
            return spec
    return None


def _is_of_python(spec: ModuleSpec | None) -> bool:
    """Tells whether a module comes with Python; one of yours may have the same name and come first."""
    if spec is None or spec.origin in (None, "built-in", "frozen"):
        return True
    folders = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")]
    place = Path(spec.origin).resolve()
    return any(place.is_relative_to(folder) for folder in folders) and "site-packages" not in place.parts


def _at_top(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module is imported, those under if, try and with included."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        for field in ("body", "orelse", "finalbody"):
            yield from _at_top(getattr(statement, field, []))
        for handler in getattr(statement, "handlers", []):
            yield from _at_top(handler.body)


def _names_of(statement: ast.stmt) -> set[str]:
    """Returns the names that a statement binds."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).partition(".")[0] for alias in statement.names}
    if isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        named = [node for target in targets for node in ast.walk(target)]
        return {node.id for node in named if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return set()


def _may_make_any_name(statement: ast.stmt) -> bool:
    """Tells whether names that no statement binds may come from this one: a star, __getattr__, globals()."""
    if isinstance(statement, ast.ImportFrom) and any(alias.name == "*" for alias in statement.names):
        return True
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return statement.name == "__getattr__"
    return any(isinstance(node, ast.Name) and node.id in _MAKERS for node in ast.walk(statement))


def _is_plainly_unmarked(statement: ast.stmt, statements: Iterable[ast.stmt]) -> bool:
    """Tells whether a definition has neither a scope nor a decorator nor a base class that could bring one."""
    if not isinstance(statement, ast.FunctionDef | ast.ClassDef) or statement.decorator_list:
        return False
    if isinstance(statement, ast.ClassDef):
        has_scope = any("scope" in _names_of(inside) for inside in statement.body)
        if has_scope or statement.bases or statement.keywords:
            return False
    nodes = [node for other in statements if isinstance(other, ast.Assign | ast.Expr) for node in ast.walk(other)]
    return not any(isinstance(node, ast.Name) and node.id == statement.name for node in nodes)


def _unmarked(where: str, is_class: bool) -> ValueError:
    way_out = _WAY_OUT_OF_CLASS if is_class else _WAY_OUT
    return ValueError(f"{where} does not say that a config may name it, so it is not called; if it is yours, {way_out}")
