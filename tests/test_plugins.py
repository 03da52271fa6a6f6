"""Classes named by text; test_permission.py has those that must not be called."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast import plug_in
from rlcm_fast.config import RewardConfig
from rlcm_fast.patience import NotDone, call_within
from rlcm_fast.plugins import build, load_class
from rlcm_fast.rewards import make_reward
from rlcm_fast.rewards.names import BUILT_IN, check_reward

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


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("human", {"comparisons": "many"}, "comparisons=many is not allowed; give a whole number, as 8"),
        ("human", {"port": 8300.5}, "port=8300.5 is not allowed; give a whole number, as 8300"),
        ("human", {"port": True}, "port=True is not allowed; give a whole number, as 8300"),
        ("human", {"undo_seconds": float("nan")}, "undo_seconds=nan is not allowed; give a finite number, as 3.0"),
        ("human", {"share_on_network": "no"}, "share_on_network=no is not allowed; give true or false"),
        ("ratings", {"file": 3}, "file=3 is not allowed; give a text"),
        ("jpeg_compressibility", {"quality": "high"}, "quality=high is not allowed; give a whole number, as 95"),
        ("safety", {"margin": None}, "margin=None is not allowed; give a finite number, as 0.2"),
        (
            "distribution_parity",
            {"classifier": "shapes_colour", "target": 1},
            "target=1 is not allowed; give a list",
        ),
        ("diversity", {"embedding": "clip", "embedding_arguments": {"batch_size": "x"}}, "batch_size=x is not allowed"),
        ("http", {"url": "http://x", "calls": {"api_key_variable": 3}}, "calls.api_key_variable=3 is not allowed"),
    ],
)
def test_an_argument_of_another_type_is_one_line(name: str, arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=f"^rewards: .*{re.escape(message)}"):
        make_reward(name, arguments)


def test_a_wrong_type_is_found_before_anything_is_built():
    with pytest.raises(ValueError, match=r"^rewards\[0\]\.name=human: comparisons=many is not allowed"):
        check_reward(RewardConfig("human", arguments={"comparisons": "many"}), "rewards[0]")


def test_a_whole_number_is_a_number_and_a_path_is_a_text(tmp_path: Path):
    build("human", {"undo_seconds": 3}, {"human": BUILT_IN["human"]})
    with pytest.raises(ValueError, match="cannot be read"):
        build("ratings", {"file": tmp_path / "none.jsonl"}, BUILT_IN)


def test_work_that_does_not_end_in_time_is_left_alone():
    started = time.monotonic()
    with pytest.raises(NotDone):
        call_within(0.05, lambda: time.sleep(5))
    assert time.monotonic() - started < 2
    assert call_within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        call_within(5, lambda: {}["x"])
