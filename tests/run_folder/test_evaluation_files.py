"""The images of the first and of the latest evaluation, and what a full disk or a killed run leaves of them."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from rlcm_fast.config import Config, TrackingConfig
from rlcm_fast.run_folder import evaluation_files
from rlcm_fast.run_folder.evaluation_files import evaluations, write_evaluation
from rlcm_fast.run_folder.tracking import Tracker

SCORES = [{"image": 0, "prompt": "a star", "scores": {"eval/a": float("nan")}, "file": "0000.png"}]


def test_the_first_and_the_latest_stay(tmp_path: Path):
    for iteration in (0, 20, 40, 100):
        write_evaluation(tmp_path, iteration, SCORES, {"0000.png": b"%d" % iteration})
    assert [path.name for path in evaluations(tmp_path)] == ["000000", "000100"]
    assert (tmp_path / "evaluation/000100/0000.png").read_bytes() == b"100"
    (line,) = (tmp_path / "evaluation/000000/scores.jsonl").read_text().splitlines()
    assert json.loads(line)["scores"] == {"eval/a": None}


def test_a_resumed_run_replaces_what_it_draws_again(tmp_path: Path):
    for iteration, content in ((0, b"a"), (20, b"b"), (0, b"c"), (10, b"d"), (5000000, b"e")):
        write_evaluation(tmp_path, iteration, SCORES, {"0000.png": content})
    found = [(path.name, (path / "0000.png").read_bytes()) for path in evaluations(tmp_path)]
    assert found == [("000000", b"c"), ("5000000", b"e")]


def test_what_a_killed_run_left_is_no_evaluation(tmp_path: Path):
    (tmp_path / "evaluation" / ".000020").mkdir(parents=True)
    assert evaluations(tmp_path) == []
    write_evaluation(tmp_path, 20, SCORES, {})
    assert [path.name for path in (tmp_path / "evaluation").iterdir()] == ["000020"]


def test_a_full_disk_costs_the_images_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = Tracker(tmp_path, Config(tracking=TrackingConfig(tensorboard=False)), 0)
    monkeypatch.setattr(evaluation_files.os, "replace", full)
    tracker.evaluation(20, SCORES, {"0000.png": b""})
    tracker.close()
    assert "evaluation after 20 iterations were not saved (No space left on device)" in capsys.readouterr().err
    assert list((tmp_path / "evaluation").iterdir()) == []


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.parallel.is_main", lambda: False)
    Tracker(tmp_path / "run", Config(), 0).evaluation(0, SCORES, {})
    assert not (tmp_path / "run").exists()
