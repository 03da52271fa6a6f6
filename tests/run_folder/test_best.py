"""The best checkpoint: what is better, what best.json survives, what pruning spares."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from rlcm_fast.run_folder.best import Best, is_better, value_of

KEY = "eval/taste/mean"


def checkpoint(run_dir: Path, iteration: int) -> Path:
    folder = run_dir / "checkpoints" / f"iteration_{iteration:06d}"
    folder.mkdir(parents=True)
    return folder


def test_higher_is_better_unless_the_metric_is_to_be_low():
    best = Best("iteration_000004", 4, KEY, 0.5)
    assert [is_better(KEY, value, best, 8) for value in (0.4, 0.5, 0.6)] == [False, False, True]
    low = Best("iteration_000004", 4, f"min:{KEY}", 0.5)
    assert [is_better(f"min:{KEY}", value, low, 8) for value in (0.4, 0.5, 0.6)] == [True, False, False]


def test_what_cannot_be_compared_begins_anew():
    best = Best("iteration_000004", 4, KEY, 0.5)
    assert is_better(KEY, 0.1, None, 8)
    assert is_better("eval/other/mean", 0.1, best, 8)  # another metric
    assert is_better(KEY, 0.1, best, 4)  # the run has gone back


def test_the_value_is_that_of_the_evaluation_if_it_is_a_number():
    metrics = {KEY: 0.25, "eval/broken/mean": math.nan}
    assert value_of(KEY, metrics) == value_of(f"min:{KEY}", metrics) == 0.25
    assert value_of("eval/broken/mean", metrics) is None and value_of("eval/none/mean", metrics) is None


def test_it_is_found_again_unless_its_checkpoint_is_gone(tmp_path: Path):
    assert Best.find(tmp_path) is None
    folder = checkpoint(tmp_path, 4)
    best = Best(folder.name, 4, KEY, 0.1 + 0.2)
    best.write(tmp_path)
    assert Best.find(tmp_path) == best and best.folder(tmp_path) == folder
    assert sorted(file.name for file in folder.parent.iterdir()) == ["best.json", folder.name]
    folder.rmdir()
    assert Best.find(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "1", json.dumps({"checkpoint": "x"})])
def test_a_broken_file_is_no_best(tmp_path: Path, text: str):
    checkpoint(tmp_path, 4)
    (tmp_path / "checkpoints" / "best.json").write_text(text)
    assert Best.find(tmp_path) is None
