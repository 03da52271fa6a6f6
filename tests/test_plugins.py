"""Classes named by text; test_permission.py has those that must not be called."""

from __future__ import annotations

import time
from collections import OrderedDict
from pathlib import Path

import pytest

from rlcm_fast import plug_in
from rlcm_fast.patience import NotDone, call_within
from rlcm_fast.plugins import build, load_class

ALIASES = {"ordered": "collections:OrderedDict"}


class Outer:
    class Inner:
        scope = "image"

    @staticmethod
    @plug_in
    def function() -> None:
        pass


def test_a_class_is_found_by_module_and_name_and_by_alias():
    assert load_class(f"{__name__}:Outer.Inner") is Outer.Inner
    assert load_class("ordered", ALIASES) is OrderedDict
    assert load_class(f"{__name__}:Outer.function") is Outer.function


def test_an_alias_needs_no_mark_but_a_name_of_the_same_class_does():
    with pytest.raises(ValueError, match="reward=collections:OrderedDict: collections is of Python's own library"):
        load_class("collections:OrderedDict", ALIASES, "reward")


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
        ("rlcm_fast.plugins:load_clas", "rlcm_fast.plugins has no load_clas; did you mean load_class?"),
        ("rlcm_fast.prompts.files:np.pi", "reward=rlcm_fast.prompts.files:np.pi is a float; name a class"),
    ],
)
def test_a_wrong_name_says_what_is_wrong_and_the_way_out(name: str, message: str):
    with pytest.raises(ValueError) as error:
        load_class(name, ALIASES, field="reward")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "missing_import",
            "import one_that_is_missing",
            "ModuleNotFoundError: No module named 'one_that_is_missing' (at",
        ),
        ("bad_syntax", "def f(:", r"SyntaxError: invalid syntax (bad_syntax.py, line 1); repair the module"),
        ("raises", "1 / 0", "ZeroDivisionError: division by zero (at rlcm_fast/plugins.py:"),
        ("exits", "raise SystemExit('bye')", "SystemExit: bye (at"),
    ],
)
def test_an_error_inside_the_module_is_one_line_with_its_place(
    name: str, content: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / f"plugin_{name}.py").write_text(content + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError) as error:
        load_class(f"plugin_{name}:Thing", field="reward")
    said = str(error.value).replace(f"plugin_{name}.py", f"{name}.py")
    assert said.startswith(f"reward=plugin_{name}:Thing: importing plugin_{name} raised {message}")


def test_whatever_a_constructor_raises_is_one_line_with_its_arguments():
    with pytest.raises(ValueError, match=r"^name=fraction arguments=.*: it raised ZeroDivisionE"):
        build("fraction", {"numerator": 1, "denominator": 0}, {"fraction": "fractions:Fraction"})


def test_work_that_does_not_end_in_time_is_left_alone():
    started = time.monotonic()
    with pytest.raises(NotDone):
        call_within(0.05, lambda: time.sleep(5))
    assert time.monotonic() - started < 2
    assert call_within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_within(5, lambda: {}["x"])
