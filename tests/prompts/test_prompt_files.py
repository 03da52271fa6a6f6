from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlcm_fast.prompts import Share, build_sampler, files, load_prompts, prompts_for_images, sources
from rlcm_fast.stages.evaluation_build import grid_prompts
from rlcm_fast.trajectory import Prompt

# Line breaks, all kinds of blanks, a byte order mark, and characters that begin with the same bytes as blanks.
awkward = st.text(st.sampled_from("ab\n\r\t \x0b\x1c\x85\xa0\u1680\u2003\u2028\u3000\u3001\u2010\xa9\ufeff\u0416"))


@pytest.fixture
def only_small_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of more than three prompts stay where they are, and are indexed in blocks of a few bytes."""
    monkeypatch.setattr(sources, "MOST_CHECKED", 3)
    monkeypatch.setattr(files, "_BLOCK_BYTES", 5)


def numbered(folder: Path, count: int, name: str = "many.txt") -> str:
    path = folder / name
    path.write_text("".join(f"prompt {number}\n" for number in range(count)))
    return str(path)


def read_whole(path: Path) -> list[Prompt]:
    """What an index and reading by offset must come to."""
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return [Prompt(line.strip()) for line in lines if line.strip()]


@given(text=awkward, mark=st.booleans(), block_bytes=st.integers(1, 12))
def test_an_indexed_file_has_the_prompts_of_one_that_is_read_whole(tmp_path_factory, text, mark, block_bytes):
    path = tmp_path_factory.mktemp("prompts") / "awkward.txt"
    path.write_bytes(b"\xef\xbb\xbf" * mark + text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_BLOCK_BYTES", block_bytes)
        indexed = files.PromptFile(path, "prompts.source=awkward.txt")
    assert list(indexed) == indexed[:] == read_whole(path)


@pytest.mark.usefixtures("only_small_lists")
def test_a_file_of_many_prompts_is_read_as_a_list_would_be(tmp_path: Path):
    prompts = load_prompts(numbered(tmp_path, 12))
    expected = [Prompt(f"prompt {number}") for number in range(12)]
    assert isinstance(prompts, files.PromptFile) and len(prompts) == 12
    assert [prompts[3], prompts[-1]] == [expected[3], expected[-1]]
    assert prompts[2:11:4] == expected[2:11:4] and prompts[::-1] == expected[::-1] and prompts[20:] == []
    with pytest.raises(IndexError):
        prompts[12]


@pytest.mark.usefixtures("only_small_lists")
@pytest.mark.parametrize("count", [3, 4])
def test_a_small_file_is_checked_at_the_start_and_a_large_one_where_it_is_read(tmp_path: Path, count: int):
    path = tmp_path / "pets.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a cat"}\r\n\r\n' + b'{"text": "a dog"}\r\n' * (count - 2) + b"a fox\r\n")
    if count == 3:
        with pytest.raises(ValueError, match=r"^prompts.source=.*pets.jsonl, line 4 is no JSON .*; write"):
            load_prompts(str(path))
        return
    prompts = load_prompts(str(path))
    assert prompts[:3] == [Prompt("a cat"), Prompt("a dog"), Prompt("a dog")]
    with pytest.raises(ValueError, match=r"^prompts.source=.*pets.jsonl, line 5 is no JSON .*; write"):
        prompts[3]


@pytest.mark.usefixtures("only_small_lists")
def test_what_is_no_utf_8_is_found_at_the_start_with_its_byte_in_the_file(tmp_path: Path):
    path = tmp_path / "latin.txt"
    path.write_bytes(b"prompt\n" * 9 + b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"latin.txt is not UTF-8 text \(.* at byte 66\); save it as UTF-8"):
        load_prompts(str(path))


def append(path: str) -> None:
    Path(path).write_text(Path(path).read_text() + "one more\n")


def touch(path: str) -> None:
    os.utime(path, ns=(0, 1))


@pytest.mark.usefixtures("only_small_lists")
@pytest.mark.parametrize("change", [append, touch, os.remove])
def test_a_file_that_changes_during_the_run_is_noticed(tmp_path: Path, change):
    path = numbered(tmp_path, 9)
    sampler = build_sampler(path, Share(2, 1, seed=0))
    sampler.next_batch()
    change(path)
    with pytest.raises(ValueError, match=r"^prompts.source=.*many.txt changed during the run .*; put the old"):
        sampler.next_batch()


@pytest.mark.usefixtures("only_small_lists")
def test_a_file_that_changed_between_two_runs_is_another_source(tmp_path: Path):
    path = numbered(tmp_path, 9)
    state = build_sampler(path, Share(2, 1, seed=0)).state_dict()
    build_sampler(path, Share(2, 1, seed=0)).load_state_dict(state)
    Path(path).write_text(Path(path).read_text().replace("prompt 7", "prompt X"))
    with pytest.raises(ValueError, match="the checkpoint was made with prompts other than these 9"):
        build_sampler(path, Share(2, 1, seed=0)).load_state_dict(state)


# In a small process of its own: the system may refuse to fork one that has mapped as much as a whole suite has.
FORKED_READERS = """
import multiprocessing, sys
from rlcm_fast.prompts import files, load_prompts, sources
sources.MOST_CHECKED, files._BLOCK_BYTES = 3, 5
prompts = load_prompts(sys.argv[1])
assert isinstance(prompts, files.PromptFile)
def put_every_prompt(queue):
    for _ in range(20):
        found = [prompts[row] for row in range(len(prompts))]
    queue.put(found)
context = multiprocessing.get_context("fork")
queue = context.Queue()
readers = [context.Process(target=put_every_prompt, args=(queue,)) for _ in range(3)]
for reader in readers:
    reader.start()
assert [queue.get(timeout=60) for _ in readers] == [prompts[:]] * 3
for reader in readers:
    reader.join()
print(len(prompts))
"""


def test_forked_processes_read_one_file(tmp_path: Path):
    command = [sys.executable, "-c", FORKED_READERS, numbered(tmp_path, 50)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.stdout == "50\n", ended.stderr


@pytest.mark.usefixtures("only_small_lists")
def test_a_file_can_be_sent_to_another_process(tmp_path: Path):
    prompts = load_prompts(numbered(tmp_path, 50))
    assert pickle.loads(pickle.dumps(prompts))[:] == prompts[:]  # noqa: S301


@pytest.mark.usefixtures("only_small_lists")
def test_measurements_read_a_few_lines_only_and_those_of_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = numbered(tmp_path, 1000)
    whole = load_prompts(path)[:]
    num_read = 0
    read = files.PromptFile._prompt

    def counted(*arguments) -> Prompt:
        nonlocal num_read
        num_read += 1
        return read(*arguments)

    monkeypatch.setattr(files.PromptFile, "_prompt", counted)
    measured, grid = prompts_for_images(load_prompts(path), 20, seed=3), grid_prompts([path], 16)
    assert num_read <= 20 + 2 * 16
    assert measured == prompts_for_images(whole, 20, seed=3)
    assert grid == whole[:: 1000 // 16][:16]


@pytest.mark.usefixtures("only_small_lists")
def test_a_file_is_indexed_once_for_all_who_ask(tmp_path: Path):
    path = numbered(tmp_path, 9)
    before = files._index.cache_info().misses
    assert load_prompts(path)[:] == load_prompts(path, "evaluation.prompts")[:]
    assert files._index.cache_info().misses == before + 1
