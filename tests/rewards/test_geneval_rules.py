"""GenEval's rules on hand-made detections whose answers are known; no model."""

from __future__ import annotations

import json
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlcm_fast.rewards.geneval_rules import Clause, Rule, Wish, judge, relations, wish_of
from rlcm_fast.rewards.mask2former import Instance
from rlcm_fast.trajectory import Prompt

LEFT, RIGHT, BELOW = (0, 40, 20, 60), (70, 40, 90, 60), (35, 80, 55, 100)


def found(*objects: tuple[str, tuple[int, int, int, int]]) -> list[Instance]:
    """Instances, the best first."""
    return [Instance(name, 1 - 0.01 * row, box, torch.ones(1, 1)) for row, (name, box) in enumerate(objects)]


def cats(count: int) -> list[Instance]:
    return found(*[("cat", LEFT)] * count)


def red_left(instances, name: str) -> list[str]:
    """What is left is red, what is right is blue."""
    return ["red" if instance.box == LEFT else "blue" for instance in instances]


def scores(wish: Wish, instances: list[Instance]) -> tuple[float, ...]:
    return tuple(judge(wish, instances, rule, red_left) for rule in get_args(Rule))


@pytest.mark.parametrize(
    ("num_found", "graded", "strict", "benchmark"),
    [(0, 0.0, 0, 0), (1, 0.5, 0, 0), (2, 1.0, 1, 1), (3, 0.5, 0, 0), (4, 0.0, 0, 0), (9, 0.0, 0, 0)],
)
def test_counts(num_found: int, graded: float, strict: float, benchmark: float):
    """Flow-GRPO's reward of nine is -2.5."""
    assert scores(wish_of(Prompt("a photo of two cats")), cats(num_found)) == (graded, strict, benchmark)


def test_one_too_many_is_enough_for_the_benchmark_where_nothing_is_excluded():
    assert scores(wish_of(Prompt("a photo of a cat")), cats(2)) == (0, 0, 1)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([("cat", LEFT), ("dog", RIGHT)], (1, 1, 1)),
        ([("cat", LEFT)], (0.5, 0, 0)),
        ([("cat", LEFT), ("dog", RIGHT), ("dog", BELOW)], (0.5, 0, 1)),
        ([("bus", LEFT)], (0, 0, 0)),
        ([], (0, 0, 0)),
    ],
)
def test_two_objects(objects: list, expected: tuple):
    assert scores(wish_of(Prompt("a photo of a cat and a dog")), found(*objects)) == expected


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([("car", LEFT)], (1, 1, 1)),
        ([("car", RIGHT)], (0.5, 0, 0)),  # the count is right, the colour is not
        ([("car", LEFT), ("car", RIGHT)], (0, 0, 1)),  # the benchmark looks at the best one
        ([("car", RIGHT), ("car", LEFT)], (0, 0, 0)),
        ([], (0, 0, 0)),
    ],
)
def test_colours(objects: list, expected: tuple):
    assert scores(wish_of(Prompt("a photo of a red car")), found(*objects)) == expected


def test_two_colours():
    wish = wish_of(Prompt("a photo of a red car and a blue cup"))
    assert scores(wish, found(("car", LEFT), ("cup", RIGHT))) == (1, 1, 1)
    assert scores(wish, found(("car", RIGHT), ("cup", LEFT))) == (0.5, 0, 0)
    assert scores(wish, found(("car", LEFT), ("cup", LEFT))) == (0.75, 0, 0)


def test_half_of_two_colours_is_half():
    wish = Wish((Clause("car", 2, "red"),))
    assert scores(wish, found(("car", LEFT), ("car", RIGHT))) == (0.75, 0, 0)


@pytest.mark.parametrize(
    ("objects", "expected"),
    [
        ([("dog", LEFT), ("chair", RIGHT)], (1, 1, 1)),
        ([("dog", RIGHT), ("chair", LEFT)], (2 / 3, 0, 0)),  # Flow-GRPO's is 3 / 4: it adds a 1 for the wrong position
        ([("dog", LEFT)], (1 / 3, 0, 0)),  # no chair to be left of
        ([("chair", RIGHT)], (1 / 3, 0, 0)),
        ([("dog", LEFT), ("dog", LEFT), ("chair", RIGHT)], (1 / 3, 0, 1)),
        ([("dog", LEFT), ("chair", RIGHT), ("chair", LEFT)], (1 / 3, 0, 1)),
    ],
)
def test_positions(objects: list, expected: tuple):
    assert scores(wish_of(Prompt("a photo of a dog left of a chair")), found(*objects)) == pytest.approx(expected)


def test_all_pairs_must_be_placed():
    wish = Wish((Clause("chair", 1), Clause("dog", 2, relation="left of", target=0)))
    assert scores(wish, found(("chair", RIGHT), ("dog", LEFT), ("dog", LEFT))) == (1, 1, 1)
    assert scores(wish, found(("chair", BELOW), ("dog", LEFT), ("dog", RIGHT)))[0] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        (LEFT, RIGHT, {"left of"}),
        (RIGHT, LEFT, {"right of"}),
        ((40, 0, 60, 20), (40, 70, 60, 90), {"above"}),
        (BELOW, (35, 0, 55, 20), {"below"}),
        ((0, 0, 20, 20), (50, 50, 70, 70), {"left of", "above"}),  # each share is 46 / 70.7
        ((0, 0, 20, 20), (6, 6, 26, 26), set()),  # 6 - 4 pixels of 8.5 are not enough
        ((0, 0, 20, 20), (4, 0, 24, 20), set()),  # within the margin
        ((0, 0, 20, 20), (0, 0, 20, 20), set()),
        ((0, 0, 20, 20), (80, 20, 100, 40), {"left of"}),  # 20 - 4 pixels down, of 82.5
    ],
)
def test_where_a_box_lies(ours: tuple, theirs: tuple, expected: set):
    assert relations(ours, theirs) == expected


def relations_in_numpy(box_a, box_b) -> set[str]:
    """The paper's appendix, in numpy."""
    a, b = np.array(box_a, float).reshape(2, 2), np.array(box_b, float).reshape(2, 2)
    offset = a.mean(axis=0) - b.mean(axis=0)
    beyond = np.clip(np.abs(offset) - 0.1 * (np.abs(a[1] - a[0]) + np.abs(b[1] - b[0])), 0, None) * np.sign(offset)
    if (np.abs(beyond) < 1e-3).all():
        return set()
    x, y = beyond / np.sqrt((offset**2).sum())
    signs = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in signs.items() if holds}


boxes = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 60)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@given(boxes, boxes)
def test_positions_are_those_of_the_transcription(ours: tuple, theirs: tuple):
    assert relations(ours, theirs) == relations_in_numpy(ours, theirs)


@pytest.mark.parametrize(
    ("text", "include", "exclude"),
    [
        ("a photo of a bench", [("bench", 1)], []),
        ("a photo of an apple", [("apple", 1)], []),
        ("a photo of a bench and a cat", [("bench", 1), ("cat", 1)], []),
        ("a photo of four clocks", [("clock", 4)], [("clock", 5)]),
        ("a photo of two buses", [("bus", 2)], [("bus", 3)]),
        ("a photo of three vases", [("vase", 3)], [("vase", 4)]),
        ("a photo of two wine glasses", [("wine glass", 2)], [("wine glass", 3)]),
        ("a photo of an orange fire hydrant", [("fire hydrant", 1, "orange")], []),
        ("a photo of an orange", [("orange", 1)], []),
        ("a photo of a red car and a white dog", [("car", 1, "red"), ("dog", 1, "white")], []),
        ("a photo of a dog right of a teddy bear", [("teddy bear", 1), ("dog", 1, "", "right of", 0)], []),
    ],
)
def test_a_text_of_genevals_forms_is_read(text: str, include: list, exclude: list):
    wish = wish_of(Prompt(text))
    assert wish.include == tuple(Clause(*clause) for clause in include)
    assert wish.is_counting == bool(exclude)
    expected = [(clause[0], clause[1]) for clause in exclude]
    assert [(clause.name, clause.count) for clause in wish.exclude] == expected


def test_metadata_comes_before_the_text():
    clauses = [{"class": "cat", "count": 1}, {"class": "Dog", "count": 2, "color": "red", "position": ["above", 0]}]
    metadata = json.dumps({"tag": "counting", "include": clauses, "exclude": [{"class": "dog", "count": 3}]})
    assert wish_of(Prompt("it rains", metadata=metadata)) == Wish(
        (Clause("cat", 1), Clause("dog", 2, "red", "above", 0)), (Clause("dog", 3),), is_counting=True
    )


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt("it rains cats and dogs"), "the prompt 'it rains cats and dogs' is none of GenEval's; give metadata"),
        (Prompt("x", metadata='{"include": [{"class": "cat"}]}'), r"is not GenEval's \('count'\); give metadata"),
        (Prompt("x", metadata='{"include": [{"class": "cat", "count": 0}]}'), "count=0 is no number of objects"),
        (
            Prompt("x", metadata='{"include": [{"class": "a", "count": 1, "color": "teal"}]}'),
            "color=teal is not one of",
        ),
        (
            Prompt("x", metadata='{"include": [{"class": "a", "count": 1, "position": ["by", 0]}]}'),
            "position=by is not one of left of",
        ),
        (
            Prompt("x", metadata='{"include": [{"class": "a", "count": 1, "position": ["above", 0]}]}'),
            "places clause 0 by clause 0; name an earlier one",
        ),
    ],
)
def test_a_prompt_that_says_nothing_is_named(prompt: Prompt, message: str):
    with pytest.raises(ValueError, match=message):
        wish_of(prompt)
