"""The rules of GenEval (arXiv 2310.11513): does a picture show what a prompt asks for? Knows objects, not models.

A prompt has clauses: a class with a count, perhaps a colour, perhaps a position relative to an earlier clause. They
come from its metadata, as in GenEval's evaluation_metadata.jsonl, or from its text if that has one of GenEval's forms:

    a photo of a bench                        a photo of a red car
    a photo of a bench and a cat              a photo of a red car and a blue cup
    a photo of three clocks                   a photo of a dog left of a chair

Rules for the score of a picture:

    graded      the mean over all terms: per clause a count term max(0, 1 - |wanted - found| / wanted); for a colour the
                same of the objects that have it; for a position 1 or 0. Both are 0 where the count is wrong.
    strict      1 if every count is equal and every colour and position is right, else 0
    benchmark   GenEval's own: at least as many, the most certain ones counted; none of what is excluded

Position: with o the offset of centres and s the sum of sizes (two numbers each), o' = sign(o) max(|o| - 0.1 s, 0); the
object is left of the other if o'_x / |o| < -0.5, and so on for right of, above and below.

`graded` and `strict` are those of Flow-GRPO (arXiv 2505.05470) with these departures:
 1. A count term is never below 0; there, 20 cats for one would be -18.
 2. A wrong position is 0; there, it adds a 0 and a 1.
 3. A position is also judged beside a wrong colour; GenEval has no such prompt.
 4. `strict` also heeds what is excluded, which is redundant in GenEval's own prompts.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlcm_fast.rewards.mask2former import Instance
from rlcm_fast.trajectory import Prompt

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
Rule = Literal["graded", "strict", "benchmark"]
ColoursOf = Callable[[Sequence[Instance], str], Sequence[str]]
"""Names the colours of instances of a class."""

_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_PLURALS = {f"{name}es": name for name in ("bus", "wine glass", "skis", "scissors")}  # of classes that end in s
_MARGIN = 0.1  # of the sum of sizes: an offset that does not count
_SURE = 0.5  # of the whole offset: how much must lie in the direction
_FORMS = (
    'give metadata, {"include": [{"class": "cat", "count": 2}], ...}, or a text such as "a photo of two cats" or '
    '"a photo of a dog left of a chair"'
)


@dataclass(frozen=True)
class Clause:
    """What a prompt asks for of one class."""

    name: str
    count: int
    colour: str = ""
    relation: str = ""  # one of RELATIONS, to the objects of the clause `target`
    target: int = 0


@dataclass(frozen=True)
class Wish:
    """All that a prompt asks for."""

    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()  # a picture must have fewer than `count` of them
    is_counting: bool = False  # GenEval then counts only objects of which the detector is very sure

    @property
    def names(self) -> set[str]:
        """The classes that matter."""
        return {clause.name for clause in (*self.include, *self.exclude)}


def wish_of(prompt: Prompt) -> Wish:
    """What the prompt asks for; raises ValueError if neither its metadata nor its text says it."""
    return _wish_of(prompt.text, prompt.metadata)


@functools.lru_cache(maxsize=4096)
def _wish_of(text: str, metadata: str) -> Wish:
    details = Prompt(text, metadata=metadata).details
    if "include" not in details:
        return _read_text(text)
    try:
        include = tuple(_read_clause(clause) for clause in details["include"])
        exclude = tuple(_read_clause(clause) for clause in details.get("exclude", []))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"the metadata {metadata} of prompt {text!r} is not GenEval's ({error}); {_FORMS}") from error
    for row, clause in enumerate(include):
        if clause.relation and not 0 <= clause.target < row:
            raise ValueError(
                f"the metadata {metadata} of prompt {text!r} places clause {row} by clause {clause.target}; name an "
                "earlier one, the first is 0"
            )
    return Wish(include, exclude, is_counting=details.get("tag") == "counting")


def _read_clause(clause: Mapping[str, Any]) -> Clause:
    """A clause of the metadata."""
    relation, target = clause.get("position", ("", 0))
    colour, count = clause.get("color", ""), clause["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count={count!r} is no number of objects")
    if colour and colour not in COLOURS:
        raise ValueError(f"color={colour} is not one of {', '.join(COLOURS)}")
    if relation and relation not in RELATIONS:
        raise ValueError(f"position={relation} is not one of {', '.join(RELATIONS)}")
    return Clause(clause["class"].lower(), count, colour, relation, int(target))


def _read_text(text: str) -> Wish:
    """What a text of GenEval's forms asks for."""
    # Take off what opens it.
    body = re.sub(r"^an? photo of ", "", text.strip().rstrip("."), flags=re.IGNORECASE).lower()
    first, rest = body.split(" ", 1) if " " in body else (body, "")

    # Two or more of one class.
    if first in _NUMBERS and rest:
        clause = Clause(_singular(rest), _NUMBERS[first])
        return Wish((clause,), (Clause(clause.name, clause.count + 1),), is_counting=True)

    # One object, or two with something between them.
    for relation in (*RELATIONS, "and"):
        left, between, right = body.partition(f" {relation} ")
        if between and relation == "and":
            return Wish((_single(left, text), _single(right, text)))
        if between:
            placed = _single(left, text)
            return Wish((_single(right, text), Clause(placed.name, 1, placed.colour, relation, 0)))
    return Wish((_single(body, text),))


def _single(phrase: str, text: str) -> Clause:
    """The clause of "a bench" or "a red bench"."""
    words = re.fullmatch(rf"an? (?:({'|'.join(COLOURS)}) )?(.+)", phrase)
    if words is None:
        raise ValueError(f"the prompt {text!r} is none of GenEval's; {_FORMS}")
    return Clause(words[2], 1, words[1] or "")


def _singular(name: str) -> str:
    """Undoes GenEval's plural: buses, clocks, vases."""
    return _PLURALS.get(name, name.removesuffix("s"))


def judge(wish: Wish, found: Sequence[Instance], rule: Rule, colours_of: ColoursOf) -> float:
    """The score in [0, 1] of a picture in which `found` is, best first."""
    by_name = {name: [instance for instance in found if instance.name == name] for name in wish.names}
    terms: list[float] = []
    matched: list[list[Instance]] = []  # of each clause; empty if the picture does not have it
    for clause in wish.include:
        taken = by_name[clause.name]
        if rule == "benchmark":
            taken = taken[: clause.count]
        of_clause, is_matched = _terms_of(clause, taken, matched, colours_of)
        terms += of_clause
        matched.append(taken if is_matched else [])
    if rule == "graded":
        return sum(terms) / len(terms)
    is_free = all(len(by_name[clause.name]) < clause.count for clause in wish.exclude)
    return float(is_free and all(matched))


def _terms_of(
    clause: Clause, taken: Sequence[Instance], matched: Sequence[Sequence[Instance]], colours_of: ColoursOf
) -> tuple[list[float], bool]:
    """The terms of a clause, and whether all of them are 1."""
    terms = [_share(len(taken), clause.count)]
    counts_match = len(taken) == clause.count
    if clause.colour:
        colours = colours_of(taken, clause.name) if counts_match else []
        terms.append(_share(list(colours).count(clause.colour), clause.count) if counts_match else 0.0)
    if clause.relation:
        pairs = [(ours, theirs) for ours in taken for theirs in matched[clause.target]] if counts_match else []
        is_placed = all(clause.relation in relations(ours.box, theirs.box) for ours, theirs in pairs)
        terms.append(float(bool(pairs) and is_placed))
    return terms, all(term == 1 for term in terms)


def _share(found: int, wanted: int) -> float:
    return max(0.0, 1 - abs(wanted - found) / wanted)


def relations(ours: Sequence[float], theirs: Sequence[float]) -> set[str]:
    """Returns how the box `ours` lies to `theirs` (left, top, right, bottom): none, one or two of RELATIONS."""
    # The offset of centres on each axis, less a margin.
    offset, beyond = [], []
    for low, high in ((0, 2), (1, 3)):
        distance = (ours[low] + ours[high] - theirs[low] - theirs[high]) / 2
        sizes = abs(ours[high] - ours[low]) + abs(theirs[high] - theirs[low])
        offset.append(distance)
        beyond.append(math.copysign(max(abs(distance) - _MARGIN * sizes, 0.0), distance))
    if max(abs(distance) for distance in beyond) < 1e-3:
        return set()

    # The directions that make up most of it.
    length = math.hypot(*offset)
    along_x, along_y = (distance / length for distance in beyond)
    found = {
        "left of": along_x < -_SURE,
        "right of": along_x > _SURE,
        "above": along_y < -_SURE,
        "below": along_y > _SURE,
    }
    return {relation for relation, is_so in found.items() if is_so}
