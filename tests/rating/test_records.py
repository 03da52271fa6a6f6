"""ratings.jsonl: every answer is there, whatever ends the run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from rlcm_fast.rating.records import Journal, Rating, read_ratings


def rating(id_: str, ranks: tuple[int, ...] | None = (1, 2)) -> Rating:
    return Rating(id_, 0, "ranking", "a fox", "default", ("a.png", "b.png"), ranks, 1.5, "2026-01-01T00:00:00+00:00")


def test_what_is_added_is_read_again(tmp_path: Path):
    journal = Journal(tmp_path / "ratings.jsonl")
    journal.add(rating("0/0"))
    journal.add(rating("0/1", None))
    assert read_ratings(journal.file) == [rating("0/0"), rating("0/1", None)]
    assert Journal(journal.file).answers == journal.answers


def test_an_undone_answer_does_not_count_and_the_last_of_an_id_does(tmp_path: Path):
    journal = Journal(tmp_path / "ratings.jsonl")
    journal.add(rating("0/0"))
    journal.undo("0/0")
    assert read_ratings(journal.file) == []
    journal.add(rating("0/0", (2, 1)))
    assert read_ratings(journal.file) == [rating("0/0", (2, 1))]
    assert len(journal.file.read_text().splitlines()) == 3, "nothing is ever deleted"


@pytest.mark.parametrize("torn", [b'{"id": "0/1", "rou', b"\x00\x00\x00"])
def test_half_a_line_is_forgiven_and_the_next_begins_anew(tmp_path: Path, torn: bytes):
    journal = Journal(tmp_path / "ratings.jsonl")
    journal.add(rating("0/0"))
    with journal.file.open("ab") as file:
        file.write(torn)
    again = Journal(journal.file)
    assert list(again.answers) == ["0/0"]
    again.add(rating("0/2"))
    assert [one.id for one in read_ratings(journal.file)] == ["0/0", "0/2"]


def test_a_full_disk_records_nothing_and_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    journal = Journal(tmp_path / "ratings.jsonl")
    journal.add(rating("0/0"))
    before = journal.file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        journal.add(rating("0/1"))
    assert journal.file.read_bytes() == before
    assert list(journal.answers) == ["0/0"]


@pytest.mark.parametrize(
    ("entry", "problem"),
    [
        ("no json", "line 1 is no JSON object"),
        (json.dumps({"id": "0/0"}), "line 1 lacks 'images'"),
        (json.dumps({"id": "0", "kind": "ranking", "images": ["a"], "ranks": [1, 2]}), "must be 1 whole numbers"),
        (json.dumps({"id": "0", "kind": "poll", "images": ["a"], "ranks": [1]}), "kind=poll"),
    ],
)
def test_a_line_that_is_no_rating_is_named(tmp_path: Path, entry: str, problem: str):
    file = tmp_path / "ratings.jsonl"
    file.write_text(entry + "\n" + "{}\n")
    with pytest.raises(ValueError, match=problem):
        read_ratings(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match=r"cannot be read .* give the ratings.jsonl of a run"):
        read_ratings(tmp_path / "none.jsonl")
