"""Plug-ins that go wrong: rewards and functions of prompts."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import plug_in
from rlcm_fast.trajectory import Prompt

NOT_CALLABLE = 3


class Answers:
    """Returns what `answer` names, instead of scores."""

    scope = "image"

    def __init__(self, answer: str = "scores") -> None:
        self._answer = answer

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        scores = images.mean(dim=(1, 2, 3))
        answers = {
            "scores": scores,
            "none": None,
            "a list": scores.tolist(),
            "an array": scores.numpy(),
            "a number": 3.0,
            "a dict": {"scores": scores},
            "a tuple": (scores, scores),
            "a text": "good",
            "one": scores[:1],
            "three": torch.zeros(3),
            "a column": scores[:, None],
            "no dimension": scores.mean(),
            "empty": scores[:0],
            "double": scores.double(),
            "half": scores.half(),
            "whole": scores.long(),
            "bool": scores > 0,
            "complex": scores.to(torch.complex64),
            "nan": scores * torch.nan,
            "inf": scores / 0,
            "one nan": torch.tensor([0.0, torch.nan]),
            "the images": images,
        }
        return answers[self._answer]


class Raises(Answers):
    """Raises what `kind` names."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        kinds = {
            "KeyError": KeyError("x"),
            "ValueError": ValueError("two\nlines"),
            "TypeError": TypeError("unsupported operand"),
            "RuntimeError": RuntimeError("CUDA error: device-side assert triggered\nmore\nmore"),
            "OSError": OSError(2, "No such file or directory", "weights.pt"),
            "SystemExit": SystemExit("bye"),
            "StopIteration": StopIteration(),
            "RecursionError": RecursionError("maximum recursion depth exceeded"),
            "AssertionError": AssertionError(),
            "NotImplementedError": NotImplementedError(),
            "UnicodeDecodeError": UnicodeDecodeError("utf-8", b"x", 0, 1, "invalid start byte"),
            "ConnectionError": ConnectionError("refused"),
            "ImportError": ImportError("no module"),
            "long": RuntimeError("x" * 10_000),
        }
        try:
            raise {}["inner"]
        except KeyError as error:
            raise kinds[self._kind] from error


class Constructor(Answers):
    def __init__(self, kind: str) -> None:
        kinds = {"KeyError": KeyError("x"), "OSError": OSError("gone"), "SystemExit": SystemExit(3)}
        raise kinds[kind]


class NoCall:
    scope = "image"


class NoScope:
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class StrangeScope(NoScope):
    scope = "batch"


class OneArgument(Answers):
    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class ThreeArguments(Answers):
    def __call__(self, images: Tensor, prompts: Sequence[Prompt], metadata: Any) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class Keywords(Answers):
    def __call__(self, *, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class SetReward:
    """A set reward whose halves return what they are told."""

    scope = "set"

    def __init__(self, describe: str = "rows", value: str = "values") -> None:
        self._describe, self._value = describe, value

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        rows = images.mean(dim=(2, 3))
        if self._describe == "raises":
            raise KeyError("describe")
        return {"rows": rows, "none": None, "flat": rows[:, 0], "nan": rows * torch.nan, "half": rows.half()}[
            self._describe
        ]

    def value(self, described: Tensor) -> Any:
        values = described.std(dim=1).sum(dim=1)
        if self._value == "raises":
            raise KeyError("value")
        wrong = {"none": None, "a number": 3.0, "rows": described, "nan": values * torch.nan}
        return {**wrong, "values": values}[self._value]


class NoValue(SetReward):
    value = None  # pyright: ignore[reportAssignmentType]


class ValueOfTwo(SetReward):
    def value(self, described: Tensor, prompts: Sequence[Prompt]) -> Any:
        return described


@plug_in
def returns_none() -> None:
    return None


@plug_in
def returns_text() -> str:
    return "a cat"


@plug_in
def returns_bytes() -> bytes:
    return b"a cat"


@plug_in
def returns_number() -> int:
    return 3


@plug_in
def returns_mapping() -> dict[str, str]:
    return {"a cat": "animals"}


@plug_in
def returns_nothing() -> list[str]:
    return []


@plug_in
def returns_blank() -> list[str]:
    return ["a cat", "  "]


@plug_in
def returns_numbers() -> list[int]:
    return [1, 2]


@plug_in
def returns_nones() -> list[None]:
    return [None]


@plug_in
def returns_lists() -> list[list[str]]:
    return [["a cat"]]


@plug_in
def returns_few() -> list[str]:
    return ["a cat"]


@plug_in
def raises() -> list[str]:
    raise RuntimeError("no\nprompts")


@plug_in
def raises_later() -> Iterator[str]:
    yield "a cat"
    raise KeyError("x")


@plug_in
def exits() -> list[str]:
    sys.exit(3)


@plug_in
def needs(path: str) -> list[str]:
    return [path]


@plug_in
def never_ends() -> Iterator[str]:
    return (f"cat {number}" for number in itertools.count())


@plug_in
def sleeps() -> list[str]:
    time.sleep(30)
    return ["a cat"]


@plug_in
class Prompts:
    """A class, where a function is needed."""
