"""What a run leaves behind, without a run; tests/test_trainer.py has a whole one."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from rlcm_fast import parallel
from rlcm_fast.config import Config, TrackingConfig, parse_config
from rlcm_fast.run_folder.tracking import Tracker, merged, say

CONFIG = Config(tracking=TrackingConfig(tensorboard=False), num_iterations=5)


def line(iteration: int) -> dict[str, float | int]:
    return {"iteration": iteration, "reward/jpeg/mean": 0.25, "images_per_second": 2.0}


def logged(run_dir: Path) -> list[int]:
    return [json.loads(text)["iteration"] for text in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_call_is_one_line_readable_at_once(tmp_path: Path):
    tracker = Tracker(tmp_path / "run", CONFIG, 0)
    tracker.log(line(0))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text()) == line(0)
    tracker.log(line(1))
    assert logged(tmp_path / "run") == [0, 1]
    tracker.close()


def test_a_resumed_run_drops_what_it_will_do_again_and_a_torn_line(tmp_path: Path):
    lines = [json.dumps(line(i)) + "\n" for i in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"iteration": 1, "rew')
    tracker = Tracker(tmp_path, CONFIG, 2)
    tracker.log(line(2))
    tracker.close()
    assert logged(tmp_path) == [0, 1, 2]


def test_lines_that_are_no_json_cost_no_others_and_what_is_lost_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    texts = [json.dumps(line(i)).encode() for i in range(5)]
    texts[1], texts[2] = b"\0" * 9 + b"\xff", b"{}"  # as a power cut leaves them
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(texts) + b"\n")
    Tracker(tmp_path, CONFIG, 4).close()
    assert logged(tmp_path) == [0, 3]
    assert "lacks 2 of the 4 lines before iteration 4" in capsys.readouterr().err


def test_a_run_killed_while_it_drops_lines_keeps_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(0)) + "\n" + json.dumps(line(1)) + "\n")
    write_text = Path.write_text

    def killed(path: Path, text: str) -> int:
        if "metrics" not in path.name:
            return write_text(path, text)
        write_text(path, text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        Tracker(tmp_path, CONFIG, 1)
    assert logged(tmp_path)[0] == 0


def test_config_and_environment_are_written(tmp_path: Path):
    models = {"pickscore": {"model": {"revision": "a1b2c3"}}}
    Tracker(tmp_path, CONFIG, 0, models).close()
    assert parse_config(["--config", str(tmp_path / "config.yaml")]) == CONFIG
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0] or environment["packages"]["torch"]
    assert environment["num_processes"] == 1
    assert environment["reward_models"] == models
    assert {"python", "platform", "git_commit", "command"} <= environment.keys()


def test_tensorboard_has_the_scalars_and_the_grids(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tracker = Tracker(tmp_path, replace(CONFIG, tracking=TrackingConfig(tensorboard=True)), 0)
    tracker.log(line(3))
    tracker.grid(3, torch.rand(2, 3, 8, 8), ["a red circle", "a star"])
    tracker.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward/jpeg/mean")] == [(3, 0.25)]
    assert [event.step for event in events.Images("grid")] == [3]
    assert Image.open(tmp_path / "grids" / "000003.png").width > 2 * 128


def test_only_the_main_process_writes_and_speaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(parallel, "is_main", lambda: False)
    tracker = Tracker(tmp_path / "run", CONFIG, 0)
    tracker.log(line(0))
    tracker.grid(0, torch.rand(1, 3, 8, 8), ["a"])
    tracker.begin(64)
    tracker.say("hello")
    say("hello")
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_wandb_that_is_not_installed_is_an_error_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"tracking.wandb=true needs wandb; pip install 'rlcm_fast\[wandb\]'"):
        Tracker(tmp_path, replace(CONFIG, tracking=TrackingConfig(tensorboard=False, wandb=True)), 0)


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ids: list[str | None] = []

    def init(**settings: Any) -> Any:
        ids.append(settings["id"])
        return SimpleNamespace(id=settings["id"] or "new", log=lambda *_, **__: None, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    config = replace(CONFIG, tracking=TrackingConfig(tensorboard=False, wandb=True))
    for first_iteration in (0, 1):
        tracker = Tracker(tmp_path, config, first_iteration)
        tracker.log(line(first_iteration))
        tracker.close()
    assert ids == [None, "new"]


@pytest.mark.parametrize("totals", [{"reward/total/mean": 0.75}, {}])
def test_a_bar_of_100_columns_shows_the_total_and_the_speed(
    totals: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((100, 24)))
    rewards = {f"reward/{name}/mean": 0.125 for name in ("jpeg_compressibility", "shapes_alignment", "diversity")}
    tracker = Tracker(tmp_path, CONFIG, 0)
    tracker.log({**line(0), **rewards, **totals})
    tracker.close()
    shown = capfd.readouterr().err.split("\r")[-1].rstrip("\n")
    assert len(shown) == 99  # tqdm leaves a column free
    assert ("total=0.750, images/s=2.0, jpeg" if totals else "images/s=2.0, jpeg") in shown


def test_the_first_iteration_is_announced_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for first_iteration, announced in ((0, "number 1 of 5, 64 images"), (3, "number 4 of 5"), (5, None)):
        tracker = Tracker(tmp_path, CONFIG, first_iteration)
        tracker.begin(64)
        tracker.close()
        said = capsys.readouterr().err
        assert ("first iteration" in said) == (announced is not None)
        assert announced is None or announced in said


@pytest.mark.parametrize("mode", ["off", "regional"])
def test_the_bar_says_that_a_network_is_compiled_until_it_is(mode: str, tmp_path: Path, capsys):
    tracker = Tracker(tmp_path, parse_config([f"--engine.compile={mode}", "--tracking.tensorboard=false"]), 0)
    assert ("compiling" in capsys.readouterr().err) == (mode == "regional")
    tracker.log(line(0))
    tracker.close()
    assert "compiling" not in capsys.readouterr().err.rpartition("jpeg=0.250")[2]


def test_a_value_that_is_not_finite_is_null_and_named_and_every_line_is_json(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    tracker = Tracker(tmp_path, replace(CONFIG, tracking=TrackingConfig(tensorboard=True)), 0)
    tracker.log({**line(0), "loss": float("nan"), "grad_norm": float("-inf")})
    tracker.log(line(1))
    tracker.close()
    lines = [json.loads(t, parse_constant=refuse) for t in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{**line(0), "loss": None, "grad_norm": None, "not_finite": ["loss", "grad_norm"]}, line(1)]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert "loss" not in events.Tags()["scalars"] and len(events.Scalars("reward/jpeg/mean")) == 2
    Tracker(tmp_path, CONFIG, 1).close()
    assert logged(tmp_path) == [0]


def test_skipped_updates_of_rounds_add_up():
    rounds = [{"skipped_updates": 1, "loss": 1.0}, {"skipped_updates": 2, "loss": 3.0}]
    assert merged(rounds) == {"skipped_updates": 3, "loss": 2.0}
