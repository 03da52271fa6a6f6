"""Classes named by text."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest

from rlcm_fast.plugins import load_class

ALIASES = {"ordered": "collections:OrderedDict"}


def test_a_class_is_found_by_module_and_name_and_by_alias():
    assert load_class("collections:OrderedDict") is OrderedDict
    assert load_class("ordered", ALIASES) is OrderedDict
    assert load_class("pathlib:Path.cwd") == Path.cwd


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("orderd", "reward=orderd is not known; did you mean ordered? known: ordered; or write package.module:Class"),
        ("collections.OrderedDict", "reward=collections.OrderedDict is not known"),
        ("collections:", "reward=collections: is not known"),
        (
            "no_such_module_here:Thing",
            "no module no_such_module_here; install its package, or put its folder on PYTHONPATH",
        ),
        ("no_such_module_here.below:Thing", "no module no_such_module_here.below"),
        ("collections:OrderdDict", "collections has no OrderdDict; did you mean OrderedDict?"),
        ("math:pi", "reward=math:pi is a float; name a class"),
    ],
)
def test_a_wrong_name_says_what_is_wrong_and_the_way_out(name: str, message: str):
    with pytest.raises(ValueError) as error:
        load_class(name, ALIASES, field="reward")
    assert message in str(error.value)


def test_an_error_inside_the_module_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a_broken_module.py").write_text("import one_that_is_missing\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="one_that_is_missing"):
        load_class("a_broken_module:Thing")
