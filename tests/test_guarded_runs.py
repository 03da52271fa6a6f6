"""Tiny runs with a guard, a best checkpoint and several rewards: they train as ever, resume, stop and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from rlcm_fast.api import Run
from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve
from rlcm_fast.given import Given
from rlcm_fast.run_folder import checkpoint as checkpoints
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.formats import FinishedRun
from rlcm_fast.stages.guard_build import build_describe
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
HELD_OUT = [{"name": "jpeg_incompressibility"}]
SETTINGS = {"num_iterations": 4, "evaluation.every": 2, "evaluation.rewards": HELD_OUT, "optimizer.warmup_updates": 0}
RAISES = {"guard.action": "raise_kl", "guard.every": 1, "guard.z": 1e-6, "guard.floor": 0.0}  # any change is outside
KEY = "eval/jpeg_incompressibility/mean"


def make_config(model: str, run_dir: Path, **settings: object) -> Config:
    named = {**SETTINGS, **{name.replace("__", "."): value for name, value in settings.items()}}
    config = parse_config(tiny_runs.arguments(model, run_dir, named))
    validate(config, 1)
    return config


def trained(model: str, run_dir: Path, **settings: object) -> Trainer:
    trainer = Trainer(make_config(model, run_dir, **settings))
    trainer.run()
    return trainer


def last_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return checkpoints.weights(checkpoints.complete(run_dir)[-1])


def assert_same_weights(run_dir: Path, other: Path) -> None:
    weights, expected = last_weights(run_dir), last_weights(other)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def plain(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run without a guard."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    trained(tiny_lcm_folder, run_dir)
    return run_dir


def test_a_guard_that_warns_changes_no_number_of_the_run(tiny_lcm_folder: str, plain: Path, tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_dir = tmp_path / "run"
    settings: dict[str, object] = {"guard__every": 1, "guard__z": 1e-6, "guard__floor": 0.0}
    trained(tiny_lcm_folder, run_dir, guard__action="warn", tracking__tensorboard=True, **settings)
    lines = tiny_runs.metrics(run_dir)
    unguarded = [{k: v for k, v in line.items() if not k.startswith("guard/")} for line in lines]
    expected = tiny_runs.metrics(plain)
    for mine, other in zip(unguarded, expected, strict=True):
        mine = {k: v for k, v in mine.items() if k in other or not k.startswith("eval/")}  # measured more often
        assert mine == other
    assert_same_weights(run_dir, plain)
    assert lines[0]["guard/outside"] == 0 and max(line["guard/outside"] for line in lines) >= 1
    assert {"guard/jpeg_incompressibility/low", "guard/saturation/high", "guard/distance_to_start"} <= lines[1].keys()
    pictures = sorted(int(path.stem) for path in (run_dir / "guard").glob("00000?.png"))
    assert pictures and (run_dir / "guard" / "start.safetensors").is_file()
    events = EventAccumulator(str(run_dir / "events")).Reload()
    assert [event.step for event in events.Images("guard")] == pictures
    assert {event.step for event in events.Images("evaluation")} == {0, 2, 4}


def test_a_run_whose_weight_is_raised_resumes_bitwise(tiny_lcm_folder: str, tmp_path: Path):
    left_alone, run_dir = tmp_path / "alone", tmp_path / "run"
    settings = {name.replace(".", "__"): value for name, value in RAISES.items()}
    trained(tiny_lcm_folder, left_alone, **settings, checkpoint__every=2, checkpoint__keep=3)
    weights = [line["guard/kl_weight"] for line in tiny_runs.metrics(left_alone)]
    assert len(set(weights)) > 2 and min(weights) > 0
    shutil.copytree(left_alone, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "iteration_000004")
    trained(tiny_lcm_folder, run_dir, **settings, checkpoint__every=2, checkpoint__keep=3, resume="latest")
    assert tiny_runs.metrics(run_dir) == tiny_runs.metrics(left_alone)
    assert_same_weights(run_dir, left_alone)
    states = [
        json.loads((folder / "checkpoints/iteration_000004/state.json").read_text()) for folder in (run_dir, left_alone)
    ]
    assert states[0]["guard"] == states[1]["guard"] and states[0]["guard"]["kl_weight"]["value"] > 0


def test_diversity_within_prompts_needs_two_images_of_one(tiny_lcm_folder: str, tmp_path: Path):
    within = {"guard__action": "warn", "guard__watch": ["held_out", "diversity_within"]}
    too_few = make_config(tiny_lcm_folder, tmp_path / "few", **within, evaluation__num_images=5)
    with pytest.raises(ValueError, match=r"guard.watch names diversity_within, and evaluation.num_images=5 gives each"):
        build_describe(resolve(too_few, 1))
    enough = make_config(tiny_lcm_folder, tmp_path / "enough", **within, evaluation__num_images=6)
    assert build_describe(resolve(enough, 1)) is not None


def test_settings_of_a_guard_that_is_off_are_said_to_do_nothing(
    tiny_lcm_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    assert build_describe(resolve(make_config(tiny_lcm_folder, tmp_path / "run"), 1)) is None
    assert "guard" not in capfd.readouterr().err
    assert build_describe(resolve(make_config(tiny_lcm_folder, tmp_path / "run", guard__every=5), 1)) is None
    assert "guard.action=off: the other settings of guard do nothing" in capfd.readouterr().err


def test_a_guard_that_stops_ends_the_run_with_a_checkpoint_and_its_last_numbers(
    tiny_lcm_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    settings = {name.replace(".", "__"): value for name, value in RAISES.items()} | {"guard__action": "stop"}
    # The held-out reward must fall: it is minus what it was, since only its change counts here.
    trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", **settings, checkpoint__best=f"min:{KEY}"))
    guard = trainer.evaluation.guard
    assert guard is not None
    guard.is_due = lambda iteration, is_scored: iteration in (0, 2)  # type: ignore[method-assign]
    band = guard._band
    guard._band = lambda name, measured: band(name, measured).__class__(1e9, 1.0)  # type: ignore[method-assign]
    guard.stops = lambda iteration: iteration == 2  # type: ignore[method-assign]
    assert not trainer.run()
    assert trainer.iteration == 2
    assert [folder.name for folder in checkpoints.complete(tmp_path / "run")] == ["iteration_000002"]
    assert tiny_runs.metrics(tmp_path / "run")[-1]["guard/outside"] >= 1
    said = capfd.readouterr().err
    assert "guard: the run stops, guard.action=stop" in said and "go on with --resume latest" in said


STOPS = {"guard__action": "stop", "guard__every": 1, "guard__acts_on": ["distance_to_start"]}
STOPS |= {"guard__floors": "{distance_to_start: 0}"}  # any change is outside
BEST = {"checkpoint__best": f"min:{KEY}", "checkpoint__export": "best"}


def test_a_stop_at_the_first_measurement_says_that_there_is_no_best_and_how_to_go_on(
    tiny_lcm_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    trainer = Trainer(make_config(tiny_lcm_folder, run_dir, **STOPS, **BEST))
    assert not trainer.run() and trainer.iteration == 1
    assert tiny_runs.metrics(run_dir)[-1]["guard/stopped"] == 1
    assert not (run_dir / "export").exists() and Best.find(run_dir) is None
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "guard: the run stops" in line]
    assert "guard.action=stop, after 1 iterations: checkpoint.best had kept none before, so nothing is exported" in line
    assert "--resume latest --guard.action warn, or go back, from the start, in another --run_dir," in line

    # What the line says is so: the same settings stop again, and a guard that warns goes on to the end.
    assert not Trainer(make_config(tiny_lcm_folder, run_dir, **STOPS, **BEST, resume="latest")).run()
    assert tiny_runs.metrics(run_dir)[-1]["guard/stopped"] == 1
    warns = {**STOPS, "guard__action": "warn"}
    assert Trainer(make_config(tiny_lcm_folder, run_dir, **warns, **BEST, resume="latest")).run()
    assert not any("guard/stopped" in line for line in tiny_runs.metrics(run_dir))
    assert (run_dir / "export" / "unet").is_dir()


def test_no_guard_stops_the_final_weights_of_a_run_that_a_callback_ends(tiny_lcm_folder: str, tmp_path: Path):
    trainer = Trainer(
        make_config(tiny_lcm_folder, tmp_path / "run", **STOPS, **BEST), Given(is_enough=lambda iteration, _: True)
    )
    assert trainer.run() and trainer.iteration == 1
    last = tiny_runs.metrics(tmp_path / "run")[-1]
    assert last["guard/outside"] >= 1 and "guard/stopped" not in last
    assert (tmp_path / "run" / "export" / "unet").is_dir()


def test_a_later_stop_exports_the_best_before_it_whatever_the_end_would_export(
    tiny_lcm_folder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    run_dir, settings = tmp_path / "run", {**STOPS, "checkpoint__best": f"min:{KEY}", "checkpoint__keep": 1}
    trainer = Trainer(make_config(tiny_lcm_folder, run_dir, **settings))
    guard = trainer.evaluation.guard
    assert guard is not None
    guard.stops = lambda iteration: iteration == 3  # type: ignore[method-assign]
    assert trainer.run() and trainer.iteration == 3
    values = {line["iteration"]: line[KEY] for line in tiny_runs.metrics(run_dir) if 0 < line["iteration"] < 3}
    best = Best.find(run_dir)
    assert best is not None and best.iteration == min(values, key=lambda i: values[i])
    assert {folder.name for folder in checkpoints.complete(run_dir)} == {best.checkpoint, "iteration_000003"}
    exported = load_file(run_dir / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    expected = checkpoints.weights(best.folder(run_dir))
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    run = Run(trainer.config, True, tiny_runs.metrics(run_dir))
    assert run.weights == best.folder(run_dir) / "unet.safetensors"
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "guard: the run stops" in line]
    back = str(best.folder(run_dir))
    assert f"{run_dir}/export is a diffusers folder of iteration {best.iteration}, the best by min:{KEY}" in line
    assert f"or go back, with --resume {back} and with a lower --optimizer.lr" in line

    # The way back that it names works.
    again = {**settings, "guard__action": "warn", "optimizer__lr": 1e-4}
    assert Trainer(make_config(tiny_lcm_folder, run_dir, **again, resume=back)).run()


@pytest.mark.parametrize("best", [KEY, pytest.param(f"min:{KEY}", marks=pytest.mark.slow)])
def test_the_best_checkpoint_outlives_pruning_and_is_exported(tiny_lcm_folder: str, tmp_path: Path, best: str):
    run_dir = tmp_path / "run"
    more = {"checkpoint__best": best, "checkpoint__export": "best", "checkpoint__every": 1, "checkpoint__keep": 1}
    trained(tiny_lcm_folder, run_dir, **more, evaluation__every=1)
    values = {line["iteration"]: line[KEY] for line in tiny_runs.metrics(run_dir) if line["iteration"] > 0}
    choose = min if best.startswith("min:") else max
    iteration = choose(values, key=lambda i: values[i])
    found = Best.find(run_dir)
    assert found is not None and (found.iteration, found.value) == (iteration, values[iteration])
    kept = {int(folder.name[-6:]) for folder in checkpoints.complete(run_dir)}
    assert kept == {iteration, 4}
    expected = checkpoints.weights(found.folder(run_dir))
    exported = load_file(run_dir / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[name], weight) for name, weight in expected.items())
    assert FinishedRun.find_best(str(run_dir)).iteration == iteration


@pytest.mark.slow
def test_a_run_that_goes_back_chooses_its_best_anew(tiny_lcm_folder: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    more = {"checkpoint__best": KEY, "checkpoint__every": 1, "checkpoint__keep": 9, "evaluation__every": 1}
    trained(tiny_lcm_folder, run_dir, **more)
    found = Best.find(run_dir)
    assert found is not None
    trained(tiny_lcm_folder, run_dir, **more, resume=str(run_dir / "checkpoints" / "iteration_000001"))
    assert Best.find(run_dir) == found


def test_an_export_without_a_best_checkpoint_says_so(plain: Path):
    with pytest.raises(ValueError, match="best=true finds no best checkpoint"):
        FinishedRun.find_best(str(plain))


def test_one_class_named_twice_is_told_apart_and_its_parts_are_logged(tiny_lcm_folder: str, tmp_path: Path):
    rewards = [
        {"name": "jpeg_compressibility", "label": "fine", "arguments": {"quality": 95}},
        {"name": "jpeg_compressibility", "label": "coarse", "arguments": {"quality": 5}, "weight": 0.5},
    ]
    more = {"rewards_combine": "normalised", "tracking__reward_gradients_every": 2, "num_iterations": 2}
    trained(tiny_lcm_folder, tmp_path / "run", rewards=rewards, **more)
    first, second, _ = tiny_runs.metrics(tmp_path / "run")
    assert {"reward/fine/mean", "reward/coarse/mean", "eval/coarse/mean"} <= first.keys()
    assert {"advantage/fine/correlation", "advantage/coarse/abs_mean"} <= first.keys()
    assert -1 <= first["gradient/fine/coarse/cosine"] <= 1 and first["gradient/coarse/norm"] > 0
    assert "gradient/coarse/norm" not in second
    expected = first["reward/fine/mean"] + 0.5 * first["reward/coarse/mean"]
    assert first["reward/total/mean"] == pytest.approx(expected)
