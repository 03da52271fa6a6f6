"""A whole run that a person rates: what is learned from, what a skipped prompt does, and how a full disk ends it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs

from benchmarks.shared.training_runs import curve

pytest.importorskip("uvicorn")

from rlcm_fast.config import parse_config
from rlcm_fast.rating.records import read_ratings
from rlcm_fast.rating.session import Session
from rlcm_fast.report import read_run
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")

Answer = Callable[[Session, dict[str, Any]], None]


def rated(model: str, run_dir: Path, answer: Answer, **settings: object) -> tuple[bool, list[dict[str, Any]]]:
    """Trains while a thread answers; tells whether the run came to its end, and its metrics."""
    own = {
        "rewards": [{"name": "human", "arguments": {"port": 0, "undo_seconds": 0}}],
        "advantages.kind": "group",
        "update.num_updates": 1,
        "update.rollout_lag": 1,
        "update.micro_batch_size": 4,
        "num_iterations": 2,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    trainer = Trainer(parse_config(tiny_runs.arguments(model, run_dir, own)))
    reward: Any = trainer.tasks.trained["default"]["human"][0]
    session, ends = reward.asking.session, threading.Event()
    visits = reward.asking._of_run.page.site.visits

    def rate() -> None:
        while not ends.wait(0.01):
            visits["last"] = time.monotonic()  # a page is open, which asks again and again
            question = session.view()["question"]
            if question is not None:
                answer(session, question)

    rater = threading.Thread(target=rate, daemon=True)
    rater.start()
    try:
        return trainer.run(), tiny_runs.metrics(run_dir)
    finally:
        ends.set()
        rater.join(5)


def first_is_best(session: Session, question: dict[str, Any]) -> None:
    session.answer(question["id"], [[0]])


def test_a_run_learns_from_ranks_and_leaves_the_ratings(tiny_lcm_folder: str, tmp_path: Path):
    is_finished, metrics = rated(tiny_lcm_folder, tmp_path / "run", first_is_best)
    assert is_finished
    assert not any("rating/win_rate" in line for line in metrics)
    assert [line["reward/human/std"] for line in metrics] == [1, 1]
    assert [line["reward/human/mean"] for line in metrics] == [0, 0]
    assert all(line["advantage/abs_mean"] == pytest.approx(1, abs=1e-5) for line in metrics)
    assert all(line["grad_norm"] > 0 for line in metrics)
    ratings = read_ratings(tmp_path / "run/ratings.jsonl")
    assert [(rating.round, rating.ranks) for rating in ratings] == [(0, (1, 2))] * 2 + [(1, (1, 2))] * 2
    assert all((tmp_path / "run" / file).is_file() for rating in ratings for file in rating.images)


def ties_if_both_are_there(session: Session, question: dict[str, Any]) -> None:
    session.answer(question["id"], [[0, 1]] if question["kind"] == "comparison" else [[0]])


COMPARED = {
    "evaluation__every": 1,
    "evaluation__num_images": 2,
    "evaluation__rewards": [{"name": "jpeg_compressibility"}],
    "checkpoint__every": 1,
    "num_iterations": 3,
}


def test_the_win_rate_of_the_finished_model_is_in_the_last_line_and_printed(
    tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    _, metrics = rated(tiny_lcm_folder, tmp_path / "run", ties_if_both_are_there, **COMPARED)
    last = metrics[-1]
    assert (last["iteration"], last["rating/of_iteration"], last["rating/win_rate"]) == (3, 3, 0.5)
    assert "after 3 iterations you preferred the tuned model in 50% of 2 pairs (standard error 35%)" in (
        capsys.readouterr().err
    )
    assert metrics[-2].items() <= last.items(), "of two lines of an iteration, readers take the last"
    run = read_run(tmp_path / "run")
    assert run.column("rating/win_rate")[-1] == (3, 0.5)
    assert run.column("eval/jpeg_compressibility/mean")[-1][0] == 3
    assert [row["iteration"] for row in curve(tmp_path / "run", seed=0)] == [0, 1, 2, 3]


def test_a_finished_run_that_is_resumed_asks_for_what_was_left_and_has_each_line_once(
    tiny_lcm_folder: str, tmp_path: Path
):
    def leaves_the_last(session: Session, question: dict[str, Any]) -> None:
        if question["id"] == "000003_held_out/0":
            session.skip_comparisons()
        else:
            ties_if_both_are_there(session, question)

    _, first = rated(tiny_lcm_folder, tmp_path / "run", leaves_the_last, **COMPARED)
    assert first[-1]["rating/of_iteration"] < 3
    _, again = rated(tiny_lcm_folder, tmp_path / "run", ties_if_both_are_there, **COMPARED, resume="latest")
    assert (again[-1]["rating/of_iteration"], again[-1]["rating/compared"]) == (3, 2)
    assert [line["iteration"] for line in again] == [0, 1, 2, 3, 3]


def test_a_stop_ends_the_last_comparisons_and_the_run_is_finished(tiny_lcm_folder: str, tmp_path: Path):
    stopped = []

    def stops_at_the_last(session: Session, question: dict[str, Any]) -> None:
        if question["id"] != "000003_held_out/0":
            ties_if_both_are_there(session, question)
        elif not stopped:
            stopped.append(True)
            os.kill(os.getpid(), signal.SIGTERM)  # as the page's button Stop does

    is_finished, _ = rated(tiny_lcm_folder, tmp_path / "run", stops_at_the_last, **COMPARED)
    assert stopped
    assert is_finished


def test_a_skipped_prompt_is_left_out_and_a_skipped_round_moves_nothing(tiny_lcm_folder: str, tmp_path: Path):
    def skips_but_one(session: Session, question: dict[str, Any]) -> None:
        if question["id"] == "000000/1":
            first_is_best(session, question)
        else:
            session.skip(question["id"])

    _, metrics = rated(tiny_lcm_folder, tmp_path / "run", skips_but_one)
    assert metrics[0]["reward/human/std"] == 1, "of the two images that have a score"
    assert metrics[0]["skipped_transitions"] == 0.5
    assert metrics[0]["grad_norm"] > 0
    assert "reward/human/std" not in metrics[1]
    assert metrics[1]["grad_norm"] == 0
