from __future__ import annotations

from rlcm_fast.prompts import load_prompts
from rlcm_fast.prompts.composition import CLASSES, HELD_OUT, RELATIONS


def test_every_ordered_pair_of_the_training_classes_comes_in_every_relation():
    texts = [prompt.text for prompt in load_prompts("rlcm_fast.prompts.composition:training")]
    assert len(set(texts)) == len(texts) == 68 * 67 * 5
    assert {"a person and a bicycle", "a bicycle on side of a person", "an elephant beside some broccoli"} <= set(texts)


def test_held_out_prompts_name_only_classes_that_training_never_names():
    texts = [prompt.text for prompt in load_prompts("rlcm_fast.prompts.composition:held_out")]
    assert len(set(texts)) == len(texts) == 12 * 11 * 5
    assert {_without_article(name) for text in texts for name in _objects(text)} == set(HELD_OUT)
    trained = [prompt.text for prompt in load_prompts("rlcm_fast.prompts.composition:training")]
    assert {_without_article(name) for text in trained for name in _objects(text)} == set(CLASSES) - set(HELD_OUT)


def _objects(text: str) -> list[str]:
    return next(text.split(f" {relation} ") for relation in RELATIONS if f" {relation} " in text)


def _without_article(name: str) -> str:
    return name.partition(" ")[2]
