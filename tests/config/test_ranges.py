"""Ranges beside the fields: what lies within, how they are found, and that every number has one."""

from __future__ import annotations

import typing
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated

import pytest

from rlcm_fast.config import Config, RewardConfig, TaskConfig, bounds, build_parser
from rlcm_fast.config.bounds import Bound
from rlcm_fast.config.marks import marks_of
from rlcm_fast.config.ranges import Images, Range, Seed, at_least, check_ranges, positive, within

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [1e-9, 0.5, 1 - 1e-9], [0.0, 1.0, -1.0, 2.0]),
        ("(0, 1]", [1e-9, 1.0], [0.0, 1.1]),
        ("[0, 1)", [0.0, 0.999], [-1e-9, 1.0]),
        ("[0, 1]", [0.0, 1.0], [-0.1, 1.1]),
        ("[1, inf)", [1, 10**12], [0]),
        ("(0, inf)", [1e-300], [0.0]),
    ],
)
def test_a_round_bracket_leaves_out_its_end(interval: str, inside: list[float], outside: list[float]):
    allowed = within(interval, "")
    assert [allowed.allows(value) for value in inside] == [True] * len(inside)
    assert [allowed.allows(value) for value in [*outside, NAN, INF, -INF]] == [False] * (len(outside) + 3)


@dataclass(frozen=True)
class Item:
    size: Images = 1


@dataclass(frozen=True)
class Section:
    rate: Annotated[float, positive("0.1", bounds.FACTOR)] = 0.1
    decays: Annotated[tuple[float, float], within("[0, 1)", "a number in [0, 1)")] = (0.0, 0.5)
    items: list[Item] = field(default_factory=list)
    free: float = 0.0


@dataclass(frozen=True)
class Whole:
    section: Section = field(default_factory=Section)
    items: list[Section] = field(default_factory=list)
    seed: Seed = 0


@pytest.mark.parametrize(
    ("whole", "message"),
    [
        (Whole(seed=-1), "seed=-1 is out of range; give 0 or more"),
        (Whole(Section(rate=NAN)), "section.rate=nan is out of range; give a positive number, as 0.1"),
        (Whole(Section(decays=(0.5, 1.0))), "section.decays[1]=1.0 is out of range; give a number in [0, 1)"),
        (Whole(Section(items=[Item(), Item(0)])), "section.items[1].size=0 is out of range; give 1 or more"),
        (Whole(items=[Section(items=[Item(-2)])]), "items[0].items[0].size=-2 is out of range; give 1 or more"),
        (
            Whole(Section(items=[Item(10**9)])),
            "section.items[0].size=1000000000 is out of range; give at most 1,000,000: a GPU draws a million images in "
            "days",
        ),
        (Whole(Section(rate=INF)), "section.rate=inf is out of range; give a positive number, as 0.1"),
    ],
)
def test_a_number_out_of_range_is_named_with_its_place(whole: Whole, message: str):
    with pytest.raises(ValueError) as error:
        check_ranges(whole)
    assert str(error.value) == message


def test_numbers_within_their_ranges_and_those_without_one_pass():
    check_ranges(Whole(Section(free=NAN, items=[Item(3)]), [Section()]))


def test_a_range_is_invisible_to_whoever_does_not_ask_for_it():
    assert typing.get_type_hints(Section)["rate"] is float
    assert marks_of(Section, Range).keys() == {"rate", "decays"}
    assert at_least(2, bounds.COUNT).remedy == "2 or more"


def sections(config_class: type) -> list[type]:
    """The class and the classes of its sections and items of lists, all the way down."""
    found = [config_class]
    for hint in typing.get_type_hints(config_class).values():
        for part in (hint, *typing.get_args(hint)):
            found += sections(part) if is_dataclass(part) and isinstance(part, type) else []
    return found


def test_every_number_of_the_config_has_a_range_that_ends():
    assert {RewardConfig, TaskConfig} <= set(sections(Config))
    without = {
        (section, item.name)
        for section in sections(Config)
        for item in fields(section)
        if typing.get_type_hints(section)[item.name] in (int, float, tuple[float, float])
        and item.name not in marks_of(section, Range)
    }
    assert without == set()
    for section in sections(Config):
        for name, allowed in marks_of(section, Range).items():
            assert allowed.high < INF or allowed.bound is not None, (section, name)
            assert not allowed.allows(1e30), (section, name)


def test_every_bound_has_a_reason():
    found = [value for value in vars(bounds).values() if isinstance(value, Bound)]
    assert len(found) > 20
    assert all(len(bound.reason.split()) > 3 for bound in found)


def test_help_says_which_numbers_a_field_may_have():
    text = " ".join(build_parser().format_help().split())
    assert "because log-probs are means over C, H, W. [a number in (0, 1), as 1e-4] (type: float" in text
    assert "each process derives its random numbers from it. [0 or more; at most 4,294,967,295] (type: int" in text
