"""The rule by closed forms, the reader with its real weights on rendered text."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import photograph, written

from rlcm_fast.config import RewardConfig
from rlcm_fast.rewards import build_reward, check_reward, used
from rlcm_fast.rewards.base import ImagesFailed
from rlcm_fast.rewards.ocr import Ocr, edit_distance, quoted, text_score
from rlcm_fast.trajectory import Prompt

TEXTS = st.text(alphabet="abc", max_size=7)


@pytest.mark.parametrize(
    ("lines", "score"),
    [
        (["HELLO WORLD!"], 1.0),
        (["hello", "world"], 1.0),
        (["xx Hello Worldxx"], 1.0),
        (["Helo World"], 0.9),
        (["Hello"], 0.5),
        (["Wrld Hello"], 0.2),
        ([], 0.0),
        (["a long text that has nothing to do with what was asked for"], 0.0),
    ],
)
def test_the_score_is_that_of_flow_grpo(lines: list[str], score: float):
    assert text_score(lines, "Hello World") == pytest.approx(score)


def plain_recursion(a: str, b: str) -> int:
    """The definition, without a table."""
    if not a or not b:
        return len(a) + len(b)
    if a[0] == b[0]:
        return plain_recursion(a[1:], b[1:])
    return 1 + min(plain_recursion(a[1:], b), plain_recursion(a, b[1:]), plain_recursion(a[1:], b[1:]))


@given(a=TEXTS, b=TEXTS)
@settings(max_examples=50)
def test_the_distance_is_the_least_number_of_edits(a: str, b: str):
    assert edit_distance(a, b) == plain_recursion(a, b)


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ('a sign that says "Open 24 hours" and "closed"', "Open 24 hours"),
        ("a sign that says \u201cOpen\u201d", "Open"),
        ("a sign that says \u201eOpen\u201c", "Open"),
        ('a sign that says \u201cOpen"', "Open"),
        ("a sign that says 'Open'", ""),
        ('a 5" screen', ""),
        ('a sign that says ""', ""),
        ("a sign", ""),
    ],
)
def test_the_target_is_the_first_quoted_text(prompt: str, target: str):
    assert quoted(prompt) == target


@pytest.fixture(scope="module")
def ocr() -> Ocr:
    pytest.importorskip("rapidocr")
    return Ocr()


def test_rendered_text_is_read_and_scored(ocr: Ocr):
    images = torch.cat(
        [written("Hello World"), written("Hello"), written("OPEN 24\nHOURS"), torch.ones(1, 3, 160, 160)]
    )
    texts = ["Hello World", "Hello World", "open 24 hours", "Hello World"]
    scores = ocr(images, [Prompt(f'a sign that says "{text}"') for text in texts])
    assert scores.dtype == torch.float32
    assert scores.tolist() == [1.0, 0.5, 1.0, 0.0]


@pytest.mark.parametrize("prompt", ["a sign", 'a sign that says ""', 'a sign that says " "'])
def test_a_prompt_without_a_text_fails_for_its_image_and_is_not_scored(ocr: Ocr, prompt: str):
    with pytest.raises(ImagesFailed) as caught:
        ocr(torch.ones(2, 3, 64, 64), [Prompt('a "sign"'), Prompt(prompt)])
    assert caught.value.problems.keys() == {1} and "no text in double quotes; quote" in caught.value.problems[1]
    assert caught.value.scores is not None and caught.value.scores[0] == 0


def test_the_whole_prompt_may_be_the_target_where_nothing_is_quoted(ocr: Ocr, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ocr, "_takes_whole", True)
    assert ocr(written("Hello World"), [Prompt("hello world")]).tolist() == [1.0]
    assert ocr(written("Hello World"), [Prompt('not "hello world"')]).tolist() == [1.0]


def test_a_reader_that_fails_is_no_score_of_zero(ocr: Ocr, monkeypatch: pytest.MonkeyPatch):
    def fails(image: object) -> None:
        raise RuntimeError("a traceback of onnxruntime\nand its cause")

    monkeypatch.setattr(ocr, "_reader", fails)
    with pytest.raises(ImagesFailed, match="RuntimeError: a traceback of onnxruntime and its cause$"):
        ocr(torch.ones(1, 3, 64, 64), [Prompt('a "sign"')])


def test_calls_at_once_agree_with_calls_in_turn(ocr: Ocr):
    texts = ["Hello", "World", "OPEN", "Closed"]
    images = [written(text, size) for text in texts for size in (96, 160)]
    prompts = [[Prompt('"Hello World"')]] * len(images)
    in_turn = [ocr(image, prompt).item() for image, prompt in zip(images, prompts, strict=True)]
    with ThreadPoolExecutor(4) as threads:
        at_once = [scores.item() for scores in threads.map(ocr, images, prompts)]
    assert at_once == in_turn and len(set(in_turn)) > 1


def test_a_photograph_without_text_is_read_as_nothing(ocr: Ocr):
    assert ocr(photograph("chelsea")[:, :, :128, :128], [Prompt('a cat, "Hello World"')]).tolist() == [0.0]


@pytest.mark.parametrize(
    "arguments", [{"without_quotes": "zero"}, {"largest_side": 0}, {"largest_side": 5.5}, {"largest_side": True}]
)
def test_a_wrong_argument_is_named(arguments: dict):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}=.*; give"):
        build_reward("ocr", arguments)


def test_a_missing_package_names_the_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(ValueError, match=r"ocr.* needs the package rapidocr .*; pip install 'rlcm_fast\[ocr\]'"):
        build_reward("ocr", {})
    with pytest.raises(ValueError, match=r"rewards\[0\].name=ocr: it needs the package rapidocr "):
        check_reward(RewardConfig("ocr"), "rewards[0]", must_run=True)


def test_what_was_used_is_the_version_of_the_package(ocr: Ocr):
    assert used({"ocr": (ocr, 1.0)})["ocr"]["package"].startswith("rapidocr ")
