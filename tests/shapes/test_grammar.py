"""The captions: round trip, counts, the held-out split."""

from __future__ import annotations

import pytest

from rlcm_fast.shapes import prompts
from rlcm_fast.shapes.grammar import (
    COLOURS,
    HELD_OUT_ARRANGEMENTS,
    HELD_OUT_PAIRS,
    OPPOSITE,
    SHAPES,
    Caption,
    Object,
    arrangement_is_held_out,
    neutral_captions,
    one_shape_captions,
    parse,
    two_shape_captions,
)

ALL = [
    *one_shape_captions(False),
    *one_shape_captions(True),
    *neutral_captions(),
    *two_shape_captions(False),
    *two_shape_captions(True),
]


def test_every_caption_survives_the_round_trip_through_text():
    assert [parse(str(caption)) for caption in ALL] == ALL


def test_texts_are_distinct():
    assert len({str(caption) for caption in ALL}) == len(ALL) == 24 + 4 + 24 * 23 * 5


def test_parsing_ignores_case_and_spaces():
    assert parse("  A red  circle LEFT OF a star ") == Caption((Object("circle", "red"), Object("star")), "left of")


@pytest.mark.parametrize(
    "text",
    ["", "circle", "a circle red", "a pink circle", "a red hexagon", "a star near a circle", "an star", "a star and"],
)
def test_text_outside_the_grammar_is_refused_with_its_words(text):
    with pytest.raises(ValueError, match="not in the grammar") as error:
        parse(text)
    assert repr(text) in str(error.value)


def test_each_shape_lacks_one_colour_and_each_such_colour_is_another():
    assert sorted(shape for _, shape in HELD_OUT_PAIRS) == sorted(SHAPES)
    assert len({colour for colour, _ in HELD_OUT_PAIRS}) == len(HELD_OUT_PAIRS)
    assert {colour for colour, _ in HELD_OUT_PAIRS} <= set(COLOURS)


def test_an_arrangement_is_held_out_in_both_wordings():
    for first, relation, second in HELD_OUT_ARRANGEMENTS:
        assert arrangement_is_held_out(first, relation, second)
        assert arrangement_is_held_out(second, OPPOSITE[relation], first)
        assert not arrangement_is_held_out(second, relation, first)
    assert not any(arrangement_is_held_out(a, "and", b) for a in SHAPES for b in SHAPES)


def test_every_word_of_a_held_out_caption_occurs_in_training():
    def words(captions):
        return {word for caption in captions for word in str(caption).split()}

    training = one_shape_captions(False) + two_shape_captions(False)
    assert words(one_shape_captions(True) + two_shape_captions(True)) <= words(training)


def test_only_captions_without_a_colour_are_neutral():
    assert [caption for caption in ALL if caption.is_neutral] == neutral_captions()


def test_prompt_sources_split_the_grammar():
    assert len(prompts.one_shape()) == 20 and len(prompts.one_shape_held_out()) == 4
    assert prompts.neutral() == ["a circle", "a square", "a triangle", "a star"]
    assert set(prompts.all_captions()).isdisjoint(prompts.all_captions_held_out())
    assert sorted(prompts.all_captions() + prompts.all_captions_held_out()) == sorted(map(str, ALL))
    assert not any(parse(text).is_held_out for text in prompts.all_captions())
    assert all(parse(text).is_held_out for text in prompts.all_captions_held_out())


def test_neutral_captions_have_no_held_out_part():
    with pytest.raises(ValueError, match="shapes:neutral:held_out"):
        prompts.neutral_held_out()
