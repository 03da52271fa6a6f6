"""Finds out which objects a prompt asks for.

In this order:

 1. `objects` of the prompt's metadata, an explicit list: {"text": "a fox under a lamp", "objects": ["fox", "lamp"]}
 2. the classes of `include`, which GenEval's lines have
 3. the grammar of the text: objects with relations of RELATIONS between them, each with an article or a number before
    it, as in "a photo of a dog next to a bicycle", "two cats and a red car", "a fox, a lamp and a chair"

A text without a relation is one object. Colours and other adjectives stay with their object: "a red car" is a red car.
"""

from __future__ import annotations

import functools
import re

from rlcm_fast.trajectory import Prompt

RELATIONS = (
    # Those of arXiv 2401.12244, then those of GenEval, then what else people write.
    *("and", "next to", "near", "on side of", "beside"),
    *("left of", "right of", "above", "below"),
    *("to the left of", "to the right of", "on the left of", "on the right of", "on the side of", "on top of"),
    *("in front of", "behind", "under", "with", "on", "in", ","),
)
_ARTICLES = ("a", "an", "the", "some", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_OPENING = re.compile(r"^(an? )?(photo|picture|image|photograph|painting|drawing)s? of ", re.IGNORECASE)
_BETWEEN = re.compile(
    "|".join(
        re.escape(relation) if relation == "," else rf"\b{re.escape(relation)}\b"
        for relation in sorted(RELATIONS, key=len, reverse=True)
    ),
    re.IGNORECASE,
)
_ARTICLE = re.compile(rf"^({'|'.join(_ARTICLES)})\s+", re.IGNORECASE)


def objects_of(prompt: Prompt) -> tuple[str, ...]:
    """The objects of a prompt without their articles, each once, in order; at least one.

    Raises ValueError if the text names none.
    """
    return _objects_of(prompt.text, prompt.metadata)


@functools.lru_cache(maxsize=4096)
def _objects_of(text: str, metadata: str) -> tuple[str, ...]:
    details = Prompt(text, metadata=metadata).details
    if "objects" in details:
        parts = details["objects"]
    elif "include" in details:
        parts = [clause["class"] for clause in details["include"]]
    else:
        parts = _BETWEEN.split(_OPENING.sub("", text.strip().rstrip(".")))
    named = [_ARTICLE.sub("", part.strip()).strip() for part in parts]
    objects = tuple(dict.fromkeys(name for name in named if name))
    if not objects:
        raise ValueError(f'the prompt {text!r} names no object; write its objects beside it, as "objects": ["a cat"]')
    return objects
