"""What a run leaves behind, without a run; tests/test_trainer.py has a whole one."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from report_runs import png

from rlcm_fast import parallel
from rlcm_fast.config import Config, TrackingConfig, parse_config
from rlcm_fast.config.batches import for_cpu
from rlcm_fast.run_folder.guard_pictures import GuardPictures
from rlcm_fast.run_folder.tracking import Tracker, merged, say

CONFIG = for_cpu(Config(tracking=TrackingConfig(tensorboard=False), num_iterations=5))


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


def test_a_plain_line_shows_the_total_first_and_the_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rewards = {f"reward/{name}/mean": 0.125 for name in ("jpeg", "shapes_alignment")}
    tracker = Tracker(tmp_path, CONFIG, 0)
    tracker.begin(64)
    tracker.log({**line(0), **rewards, "reward/total/mean": 0.75})
    tracker.log(line(1))  # within ten seconds: no line
    tracker.close()
    shown = capsys.readouterr().err.splitlines()[1:]
    assert len(shown) == 1
    assert shown[0].startswith("iteration 1 of 5: total 0.750, jpeg 0.125, shapes_alignment 0.125; 2.0 images/s; ")
    assert shown[0].endswith(" left") and "\r" not in shown[0] and "\x1b" not in shown[0]


def test_the_first_iteration_is_announced_by_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for first_iteration, announced in ((0, "number 1 of 5, 64 images"), (3, "number 4 of 5"), (5, None)):
        tracker = Tracker(tmp_path, CONFIG, first_iteration)
        tracker.begin(64)
        tracker.close()
        said = capsys.readouterr().err
        assert ("first iteration" in said) == (announced is not None)
        assert announced is None or announced in said


@pytest.mark.parametrize("mode", ["off", "regional"])
def test_it_is_said_that_the_first_iteration_compiles(mode: str, tmp_path: Path, capsys):
    Tracker(tmp_path, parse_config([f"--engine.compile={mode}", "--tracking.tensorboard=false"]), 0).close()
    assert ("compiling" in capsys.readouterr().err) == (mode == "regional")


def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, dict[str, Any]]]:
    """Takes the place of wandb; returns what is logged, by step."""
    logged: list[tuple[int, dict[str, Any]]] = []

    def init(**_: Any) -> Any:
        return SimpleNamespace(id="new", log=lambda values, step: logged.append((step, values)), finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda picture: picture))
    return logged


def test_tensorboard_and_wandb_get_the_same_keys_values_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import io

    import numpy as np
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Log two iterations, the pictures of one, the evaluation after the last one, and a value that is missing.
    of_wandb = fake_wandb(monkeypatch)
    tracker = Tracker(tmp_path, replace(CONFIG, tracking=TrackingConfig(tensorboard=True, wandb=True)), 0)
    tracker.grid(0, torch.rand(2, 3, 8, 8), ["a red circle", "a star"])
    guard = GuardPictures(tmp_path / "guard")
    tracker.guard(0, guard.compare(0, torch.rand(2, 3, 8, 8), ["a red circle", "a star"]))
    tracker.guard(1, guard.file(1))  # it did not speak
    rows = [{"image": i, "prompt": "a star", "scores": {"eval/jpeg": 0.5}, "file": f"{i}.png"} for i in range(20)]
    tracker.evaluation(0, rows, {f"{i}.png": png((10 * i, 0, 0), (8, 8)) for i in range(12)})
    tracker.evaluation(1, rows, {})  # none is kept
    tracker.log({**line(0), "eval/jpeg/mean": 0.5, "loss": float("nan")})
    tracker.log({**line(1), "guard/payload": 1.0})
    tracker.log({"iteration": 2, "eval/jpeg/mean": 0.75})
    tracker.close()

    # Compare what both have.
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    pictures = {(key, step): v for step, values in of_wandb for key, v in values.items() if isinstance(v, Image.Image)}
    of_tensorboard = {(key, e.step): e.value for key in events.Tags()["scalars"] for e in events.Scalars(key)}
    scalars = {(key, step): v for step, values in of_wandb for key, v in values.items() if (key, step) not in pictures}
    assert scalars == pytest.approx(of_tensorboard)
    assert set(scalars) == {
        *((key, step) for step in (0, 1) for key in line(0)),
        *(("eval/jpeg/mean", step) for step in (0, 2)),
        ("guard/payload", 1),
        ("iteration", 2),
    }
    assert set(pictures) == {(key, 0) for key in ("grid", "guard", "evaluation")}
    assert set(events.Tags()["images"]) == {"grid", "guard", "evaluation"}
    for (key, step), picture in pictures.items():
        (event,) = events.Images(key)
        assert event.step == step
        with Image.open(io.BytesIO(event.encoded_image_string)) as image:
            assert np.array_equal(np.asarray(picture), np.asarray(image))
    for key, file in (("grid", "grids/000000.png"), ("guard", "guard/000000.png")):
        with Image.open(tmp_path / file) as image:
            assert np.array_equal(np.asarray(pictures[key, 0]), np.asarray(image))
    reds = {tuple(colour) for colour in np.asarray(pictures["evaluation", 0]).reshape(-1, 3) if not colour[1:].any()}
    assert {(10 * i, 0, 0) for i in range(8)} <= reds and (80, 0, 0) not in reds, "the first eight, in their colours"


def test_the_report_is_renewed_at_evaluations_and_at_the_end(tmp_path: Path):
    config = replace(CONFIG, tracking=TrackingConfig(tensorboard=False, report=True))
    tracker = Tracker(tmp_path, config, 0)
    tracker.log(line(0))
    assert not (tmp_path / "report.html").exists()
    tracker.log({**line(1), "eval/jpeg/mean": 0.5})
    assert "after 2 of 5 iterations" in (tmp_path / "report.html").read_text()
    tracker.log(line(2))
    tracker.close()
    assert "after 3 of 5 iterations" in (tmp_path / "report.html").read_text()


def test_a_report_that_fails_is_one_line_and_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any) -> None:
        raise RuntimeError("no paper\nis left")

    monkeypatch.setattr("rlcm_fast.report.write_report", fail)
    tracker = Tracker(tmp_path, replace(CONFIG, tracking=TrackingConfig(tensorboard=False, report=True)), 0)
    for iteration in range(3):
        tracker.log({**line(iteration), "eval/jpeg/mean": 0.5})
    tracker.close()
    said = [text for text in capsys.readouterr().err.splitlines() if "report" in text]
    assert said == ["report.html was not written, and the run goes on without it (RuntimeError: no paper)"]
    assert logged(tmp_path) == [0, 1, 2]


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
