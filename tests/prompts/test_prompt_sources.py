from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast import plug_in
from rlcm_fast.prompts import load_prompts, sources
from rlcm_fast.trajectory import Prompt

texts = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1).map(str.strip).filter(bool)


@plug_in
def two_pets() -> list[str | Prompt]:
    return ["a cat", Prompt("a dog", task="dogs")]


@plug_in
def nothing() -> list[str]:
    return []


@plug_in
def a_blank() -> list[str]:
    return ["a cat", " "]


@plug_in
def a_number() -> list[int]:
    return [3]


@plug_in
def returns_none() -> None:
    return None


@plug_in
def returns_a_text() -> str:
    return "a cat"


@plug_in
def returns_a_mapping() -> dict[str, str]:
    return {"a cat": "animals"}


@plug_in
def raises() -> list[str]:
    raise RuntimeError("no\nprompts")


@plug_in
def exits() -> list[str]:
    raise SystemExit("bye")


@plug_in
def needs_an_argument(path: str) -> list[str]:
    return [path]


@plug_in
def never_ends() -> Iterator[str]:
    return (f"cat {number}" for number in itertools.count())


@plug_in
def sleeps() -> list[str]:
    time.sleep(5)
    return ["a cat"]


def test_a_text_file_has_one_prompt_a_line(tmp_path):
    path = tmp_path / "pets.txt"
    path.write_text("a cat\n\n  a dog \r\na cat\n")
    assert load_prompts(str(path)) == [Prompt("a cat"), Prompt("a dog"), Prompt("a cat")]


def test_a_byte_order_mark_is_not_part_of_the_first_prompt(tmp_path):
    path = tmp_path / "pets.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat\n")
    assert load_prompts(str(path)) == [Prompt("a cat")]


def test_a_json_lines_file_may_name_tasks(tmp_path):
    path = tmp_path / "pets.jsonl"
    path.write_text('{"text": "a cat"}\n\n{"text": "a dog", "task": "dogs"}\n')
    assert load_prompts(str(path)) == [Prompt("a cat"), Prompt("a dog", "dogs")]


def test_a_line_may_hold_what_rewards_know_of_the_prompt(tmp_path):
    path = tmp_path / "pets.jsonl"
    geneval = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "a photo of two cats"}
    path.write_text('{"text": "a cat in a hat", "objects": ["cat", "hat"]}\n' + json.dumps(geneval) + "\n")
    objects, counting = load_prompts(str(path))
    assert objects.details == {"objects": ["cat", "hat"]}
    assert (counting.text, counting.task) == ("a photo of two cats", "default")
    assert counting.details == {"tag": "counting", "include": [{"class": "cat", "count": 2}]}
    assert Prompt("a cat").details == {}
    assert len({objects, counting, Prompt(objects.text)}) == 3  # prompts are keys of statistics


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a cat", "objects": "cat"}', r'line 1 is .*objects is not a list of names; write \["a cat"'),
        ('{"text": "a cat", "objects": []}', "objects is not a list of names"),
        ('{"text": "a cat", "include": ["cat"]}', r'include is not a list of objects; write \[\{"class": "cat"'),
        ('{"text": "a cat", "tag": 3}', "tag is not a text"),
    ],
)
def test_wrong_details_are_named(tmp_path, line: str, message: str):
    path = tmp_path / "pets.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_prompts(str(path))


@given(prompts=st.lists(st.builds(Prompt, texts, texts), min_size=1))
@settings(deadline=None)
def test_any_text_survives_a_json_lines_file(tmp_path_factory, prompts: list[Prompt]):
    path = tmp_path_factory.mktemp("prompts") / "any.jsonl"
    lines = [json.dumps({"text": prompt.text, "task": prompt.task}, ensure_ascii=False) for prompt in prompts]
    path.write_text("\n".join(lines), encoding="utf-8")
    assert load_prompts(str(path)) == prompts


@pytest.mark.parametrize(
    "line",
    ["a cat", '"a cat"', "{}", '{"prompt": "a cat"}', '{"text": 3}', '{"text": " "}', '{"text": "a", "weight": 2}'],
)
def test_a_bad_json_line_is_named_with_its_number_and_a_good_example(tmp_path, line: str):
    path = tmp_path / "pets.jsonl"
    path.write_text('{"text": "a cat"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r'pets.jsonl, line 2 is .*write \{"text": "a cat"\}'):
        load_prompts(str(path))


@pytest.mark.parametrize("name", ["missing.txt", "missing.jsonl"])
def test_a_missing_file_is_named_with_the_field_and_the_remedy(name: str):
    with pytest.raises(ValueError, match=rf"^evaluation.prompts={name}: there is no such file under .*; give the path"):
        load_prompts(name, field="evaluation.prompts")


@pytest.mark.parametrize("content", ["", "\n \n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl"])
def test_an_empty_file_is_named_with_the_remedy(tmp_path, name: str, content: str):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"prompts.source=.*{name} is an empty file; write one prompt per line"):
        load_prompts(str(tmp_path / name))


def test_a_file_that_is_no_utf_8_is_named_with_the_remedy(tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text .*; save it as UTF-8"):
        load_prompts(str(tmp_path / "latin.txt"))


@pytest.mark.parametrize("source", ["animals", "shapes", "shapes:three", "shapes:one:heldout", "animals.csv"])
def test_an_unknown_source_lists_the_built_in_ones(source: str):
    with pytest.raises(ValueError, match=rf"prompts.source={source} is no prompt source; .*shapes:one.*shapes:all"):
        load_prompts(source)


def test_a_function_of_the_users_own_gives_texts_or_prompts():
    assert load_prompts(f"{__name__}:two_pets") == [Prompt("a cat"), Prompt("a dog", "dogs")]


@pytest.mark.parametrize(
    ("function", "problem"), [("nothing", "holds no prompts"), ("a_blank", "non-empty"), ("a_number", "the prompt 3")]
)
def test_what_a_function_returns_is_checked(function: str, problem: str):
    with pytest.raises(ValueError, match=rf"prompts.source={__name__}:{function} .*{problem}"):
        load_prompts(f"{__name__}:{function}")


@pytest.mark.parametrize("name", ["one", "two", "neutral", "all"])
def test_the_captions_of_shapes_world_have_names(name: str):
    prompts = load_prompts(f"shapes:{name}")
    assert prompts and len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", ["one", "two"])
def test_held_out_captions_are_not_among_those_of_training(name: str):
    held_out = set(load_prompts(f"shapes:{name}:held_out"))
    assert held_out and held_out.isdisjoint(load_prompts("shapes:all"))


def test_a_kind_that_holds_nothing_out_says_so_and_names_the_field():
    with pytest.raises(ValueError, match=r"^evaluation.prompts=shapes:neutral:held_out: .*; use shapes:neutral"):
        load_prompts("shapes:neutral:held_out", field="evaluation.prompts")


def test_a_plug_in_that_is_not_there_names_the_field():
    with pytest.raises(ValueError, match=r"^prompts.source=no_such_module:prompts: .*no_such_module"):
        load_prompts("no_such_module:prompts")


def test_every_kind_of_shapes_captions_has_a_held_out_counterpart():
    trained = {name for name in sources.BUILT_IN if not name.endswith(":held_out")}
    assert {f"{name}:held_out" for name in trained} == sources.BUILT_IN.keys() - trained
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("returns_none", "returned no list; return a list of non-empty str or of Prompt"),
        ("returns_a_text", "returned no list; return a list"),
        ("returns_a_mapping", "returned no list; return a list"),
        ("raises", "raised RuntimeError: no prompts (at "),
        ("exits", "raised SystemExit: bye (at "),
        ("needs_an_argument", "is called without arguments: missing a required argument: 'path'; it accepts path"),
        ("never_ends", "returns more than 100 prompts, or never ends; return fewer, or write them into a .txt file"),
        ("sleeps", "has not returned after 0.1 s; write its prompts into a .txt file once, and name that"),
    ],
)
def test_a_function_that_goes_wrong_is_one_line(function: str, problem: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MOST_RETURNED", 100)
    monkeypatch.setattr(sources, "SECONDS", 0.1)
    with pytest.raises(ValueError) as error:
        load_prompts(f"{__name__}:{function}")
    assert str(error.value).startswith(f"prompts.source={__name__}:{function}")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
