"""What a person is asked, in which order, and until when an answer can be taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlcm_fast.rating import session as session_module
from rlcm_fast.rating.records import Journal, Kind
from rlcm_fast.rating.session import Plan, Question, Session, Unknown
from rlcm_fast.rating.win_rate import WinRate


def question(id_: str, kind: Kind = "ranking", number: int = 0) -> Question:
    images = tuple(f"ratings/{id_}/{place}.png" for place in range(2 if kind == "comparison" else 3))
    return Question(id_, number, kind, f"prompt of {id_}", "default", images, (64, 64))


def session_in(folder: Path, undo_seconds: float = 0.0) -> Session:
    return Session(Journal(folder / "ratings.jsonl"), Plan(60, undo_seconds))


def asked(session: Session) -> str | None:
    shown = session.view()["question"]
    return shown and shown["id"]


def test_a_round_is_asked_prompt_by_prompt_and_settled_at_the_end(tmp_path: Path):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0"), question("0/1")])
    assert not session.is_settled("0")
    session.answer("0/0", [[2], [0]])
    assert asked(session) == "0/1"
    session.skip("0/1")
    assert asked(session) is None
    assert session.is_settled("0")
    assert [rating.ranks for rating in session.take("0")] == [(2, 3, 1), None]


def test_the_next_round_may_be_rated_before_the_first_is_taken(tmp_path: Path):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0")])
    session.open_round("1", [question("1/0", number=1)])
    assert session.view()["rounds_ready"] == 2
    assert session.view()["next"] == [list(question("1/0").images)]
    session.answer("0/0", [[0]])
    session.answer("1/0", [[1]])
    assert session.is_settled("0")
    session.take("0")
    assert session.view()["round"] == 2
    assert [rating.ranks for rating in session.take("1")] == [(2, 1, 2)]


def test_the_last_answer_can_be_taken_back_until_the_run_has_it(tmp_path: Path):
    session = session_in(tmp_path, undo_seconds=60)
    session.open_round("0", [question("0/0"), question("0/1")])
    session.answer("0/0", [[0]])
    session.answer("0/1", [[1]])
    assert not session.is_settled("0"), "the time for an undo is not over"
    session.undo()
    session.undo()
    assert asked(session) == "0/0"
    with pytest.raises(Unknown):
        session.undo()
    session.answer("0/0", [[2]])
    session.answer("0/1", [[2]])
    session.open_round("1", [question("1/0", number=1)])
    session.answer("1/0", [[0]])
    assert session.is_settled("0"), "an answer about the next round ends the time"
    assert [rating.ranks for rating in session.take("0")] == [(2, 2, 1), (2, 2, 1)]
    session.undo()
    assert asked(session) == "1/0"
    with pytest.raises(Unknown, match="has learned"):
        session.undo()


def test_an_answer_counts_once_from_whatever_tab(tmp_path: Path):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0")])
    session.answer("0/0", [[0]])
    for act in (
        lambda: session.answer("0/0", [[1]]),
        lambda: session.skip("0/0"),
        lambda: session.answer("9/9", [[0]]),
    ):
        with pytest.raises(Unknown):
            act()
    assert [rating.ranks for rating in session.take("0")] == [(1, 2, 2)]


def test_a_restart_goes_on_in_the_middle_of_a_round(tmp_path: Path):
    first = session_in(tmp_path)
    first.open_round("0", [question("0/0"), question("0/1")])
    first.answer("0/0", [[1]])
    second = session_in(tmp_path)
    second.open_round("0", [question("0/0"), question("0/1")])
    assert asked(second) == "0/1"
    second.answer("0/1", [[0]])
    assert [rating.ranks for rating in second.take("0")] == [(2, 1, 2), (1, 2, 2)]


def test_other_images_are_asked_for_anew(tmp_path: Path):
    first = session_in(tmp_path)
    first.open_round("0", [question("0/0")])
    first.answer("0/0", [[1]])
    second = session_in(tmp_path)
    other = Question("0/0", 0, "ranking", "p", "default", ("ratings/0_2/0.png", "ratings/0_2/1.png"), (64, 64))
    second.open_round("0", [other])
    assert asked(second) == "0/0"


def test_comparisons_come_first_hide_which_is_which_and_hold_nothing_up(tmp_path: Path):
    session = session_in(tmp_path)
    pairs = [question(f"10_held_out/{place}", "comparison", 10) for place in range(8)]
    session.open_comparisons(pairs)
    session.open_round("10", [question("10/0", number=10)])
    assert {tuple(pair.order) for pair in pairs} == {(0, 1), (1, 0)}
    for pair in pairs[:6]:
        session.answer(pair.id, [[pair.order.index(0)]])  # the tuned model's image
    session.answer(pairs[6].id, [[0, 1]])
    session.skip_comparisons()
    assert asked(session) == "10/0"
    shown = {"round": 10, "wins": 6, "ties": 1, "losses": 0, "rate": 6.5 / 7}
    assert session.view()["win_rates"] == [shown]
    session.answer("10/0", [[0]])
    assert session.is_settled("10")


def test_only_images_that_are_asked_for_can_be_seen(tmp_path: Path):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0")])
    assert session.has_image("ratings/0/0/0.png")
    assert not session.has_image("ratings/token")
    assert not session.has_image("config.yaml")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that the session's clock shows, its only item."""
    now = [1000.0]
    monkeypatch.setattr(session_module.time, "monotonic", lambda: now[0])
    return now


def seconds_of(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "ratings.jsonl").read_text().splitlines()]
    return [line["seconds"] for line in lines if "seconds" in line]


def test_what_happens_elsewhere_while_somebody_looks_costs_no_seconds(tmp_path: Path, clock: list[float]):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0")])
    session.open_round("1", [question("1/0", number=1)])
    session.view()
    session.answer("0/0", [[0]])
    session.view()
    clock[0] += 1
    session.take("0")
    session.open_round("2", [question("2/0", number=2)])
    session.view()
    clock[0] += 0.1
    session.answer("1/0", [[0]])
    assert seconds_of(tmp_path) == [0, 1.1]
    assert session.view()["median_seconds"] == 1.1


def test_the_clock_begins_when_a_page_shows_the_question(tmp_path: Path, clock: list[float]):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0"), question("0/1")])
    clock[0] += 60  # nobody has opened the page yet
    session.view()
    clock[0] += 2
    session.view()
    session.answer("0/0", [[0]])
    clock[0] += 3
    session.undo()
    clock[0] += 4
    session.answer("0/0", [[1]])
    assert seconds_of(tmp_path) == [2, 4]


def test_comparisons_that_come_first_do_not_count_for_the_prompt_behind_them(tmp_path: Path, clock: list[float]):
    session = session_in(tmp_path)
    session.open_round("0", [question("0/0")])
    clock[0] += 5
    session.open_comparisons([question("9_held_out/0", "comparison", 9)])
    clock[0] += 2
    session.answer("9_held_out/0", [[0]])
    clock[0] += 1
    session.answer("0/0", [[0]])
    assert seconds_of(tmp_path) == [2, 1]


def test_a_win_rate_has_a_standard_error_even_if_every_pair_was_won():
    half, all_won = WinRate(10, wins=3, ties=2, losses=3), WinRate(10, wins=8, ties=0, losses=0)
    assert (half.rate, half.standard_error) == (0.5, pytest.approx(0.5 / 8**0.5))
    assert (all_won.rate, all_won.standard_error) == (1, pytest.approx(0.5 / 8**0.5)), "as the report has it"
    assert "100% of 8 pairs (standard error 18%)" in all_won.sentence
