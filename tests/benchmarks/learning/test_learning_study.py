"""The learning study's counts, settings and sweeps; nothing is trained here."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from rlcm_fast.config import parse_config, to_yaml
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks" / "learning"
CONFIGS = FOLDER.parent.parent / "configs" / "shapes"
FIGURES = ("ablations", "algorithms", "fairness", "joint", "realism")
OTHERS = ("inference_time", "rlcm_against_ddpo", "unseen_prompts")


@pytest.mark.parametrize(
    ("config", "options", "forwards"),
    [
        # 64 images, 4 steps, 3 of them actions: 64 * 4 + 192; the KL term looks at each of the 192 once more
        ("compressibility", "--update.kl_weight 0", 256 + 192),
        ("compressibility", "", 256 + 192 + 192),
        ("compressibility", "--update.num_updates 4 --update.micro_batch_size 48", 256 + 192 + 192),
        ("compressibility", "--update.kl_weight 0 --update.num_passes 3", 256 + 3 * 192),
        ("compressibility", "--update.kl_weight 0 --policy.last_step renoise", 256 + 256),
        # 64 pairs an update
        ("compressibility", "--update.kl_weight 0 --pretraining.data shapes:one --pretraining.weight 1", 448 + 64),
        # the second update of 2 asks how its 96 log-probs have changed
        (
            "compressibility",
            "--update.kl_weight 0 --algorithm.name rebel --update.num_updates 2 --update.micro_batch_size 48",
            448 + 96,
        ),
        # 64 images, 50 steps of two rows, 49 or 5 trained actions of two rows
        ("ddpo_compressibility", "", 64 * 50 * 2 + 64 * 49 * 2),
        ("ddpo_compressibility", "--update.num_timesteps 5", 64 * 50 * 2 + 64 * 5 * 2),
        ("ddpo_compressibility", "--policy.num_steps 10 --policy.guidance_scale 1", 64 * 10 + 64 * 9),
        # 128 and twice 64 images, the reference once more, in one round or one after another
        ("joint", "", 256 * (4 + 3 + 3)),
        ("joint", "--task_schedule by_task", 256 * (4 + 3 + 3)),
    ],
)
def test_forwards_of_an_iteration_are_those_counted_by_hand(
    load: Callable[[str], ModuleType], config: str, options: str, forwards: int
):
    parsed = parse_config(["--config", str(CONFIGS / f"{config}.yaml"), *options.split()])
    validate(parsed, 1)
    assert load("learning.forwards").forwards_per_iteration(parsed) == forwards


def test_an_arm_is_the_command_line_of_its_file_and_its_overrides(load: Callable[[str], ModuleType], tmp_path: Path):
    arm = load("learning.arms").Arm("a", "compressibility", ("optimizer.lr", "1e-3")).but("num_iterations", "7")
    config = parse_config(arm.but("optimizer.lr", "5e-5").arguments(2, tmp_path / "run"))
    assert (config.optimizer.lr, config.num_iterations, config.seed) == (5e-5, 7, 2)
    assert config.run_dir == str(tmp_path / "run")
    assert not config.tracking.tensorboard
    with pytest.raises(ValueError, match="override=seed"):
        arm.but("seed", "1").arguments(0, tmp_path)


@pytest.mark.parametrize("name", [*FIGURES, *OTHERS])
def test_every_figure_answers_help(name: str):
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--jobs" in done.stdout


@pytest.mark.parametrize("name", FIGURES)
def test_every_arm_of_a_figure_is_a_valid_config(load: Callable[[str], ModuleType], name: str):
    arms = load(f"learning.{name}").arms()
    assert len({arm.name for arm in arms}) == len(arms) >= 2
    for arm in arms:
        validate(parse_config(arm.arguments(0, Path("run"))), 1)


@pytest.mark.parametrize("reward", ["compressibility", "incompressibility", "alignment"])
def test_rlcm_and_ddpo_are_given_the_same_rewards(load: Callable[[str], ModuleType], reward: str):
    configs = [parse_config(arm.arguments(0, Path("run"))) for arm in load("learning.rlcm_against_ddpo").arms(reward)]
    for config in configs:
        assert validate(config, 1).sizes.samples_per_iteration == (96 if reward == "alignment" else 64)
        assert config.update.kl_weight == 0
        assert [r.name for r in config.rewards] == [r.name for r in configs[0].rewards]
    weights = {tuple(reward.weight for reward in config.rewards) for config in configs}
    assert len(weights) == 1


def test_every_arm_has_its_own_rate_and_another_figure_tunes_its_own_arms_only(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    figure, rates = load("learning.rlcm_against_ddpo"), {"rlcm": "1e-4", "ddpo_50": "5e-5", "ddpo_10": "2e-5"}

    def tuned(arms: Sequence[Any], lrs: Sequence[str], share: float, arguments: argparse.Namespace) -> dict[str, Any]:
        return {arm.name: arm.but("optimizer.lr", rates.get(arm.name, lrs[0])) for arm in arms}

    trained: list[Any] = []
    monkeypatch.setattr(figure, "tuned", tuned)
    monkeypatch.setattr(figure, "train_arms", lambda arms, arguments: trained.append((arms, arguments.out)))
    arguments = argparse.Namespace(runs=tmp_path / "other", out=tmp_path / "figure", reward="compressibility")
    every = figure._with_rates(figure.arms("compressibility"), arguments)
    assert {name: arm.overrides[-1] for name, arm in every.items()} == rates
    chosen, own = figure.trained_arms("compressibility", arguments, ["ddpo_50"])
    assert chosen == {"ddpo_50": every["ddpo_50"]}
    assert own.runs == tmp_path / "rlcm_against_ddpo" / "compressibility"
    assert trained == [([every["ddpo_50"]], own.runs / "rlcm_against_ddpo")]


def test_specialists_of_the_joint_figure_have_the_queries_of_the_joint_model(load: Callable[[str], ModuleType]):
    arms = load("learning.joint").arms()
    mixed, by_task, *alone = every = [parse_config(arm.arguments(0, Path("run"))) for arm in arms]
    assert (mixed.task_schedule, by_task.task_schedule) == ("mixed", "by_task")
    tasks = resolve(mixed, 1).tasks
    assert [resolve(config, 1).tasks for config in alone] == [(task,) for task in tasks]
    assert resolve(by_task, 1).tasks == tasks
    assert {(config.num_iterations, config.update.kl_weight) for config in every} == {(60, 0.02)}


def test_a_run_whose_name_has_a_dot_has_a_log_of_its_own(load: Callable[[str], ModuleType], tmp_path: Path):
    for name in ("lr_1.2e-4", "lr_1.5e-4"):
        load("shared.training_runs")._run(["echo", name], tmp_path / name, 2)
        assert (tmp_path / f"{name}.log").read_text() == f"{name}\n"


def test_a_study_trains_only_what_is_not_finished(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arms, runs = load("learning.arms"), load("shared.training_runs")
    two = [arms.Arm(name, "compressibility", ("num_iterations", "2")) for name in ("a", "b")]
    # One job: `run` below reads a config, and CPython 3.11 fails now and then to parse two sources in two threads.
    arguments = argparse.Namespace(runs=tmp_path, seeds=[0, 1], jobs=1, override=[])
    started: list[tuple[str, bool]] = []

    def run(command: list[str], folder: Path, jobs: int) -> Any:
        started.append((str(folder.relative_to(tmp_path)), "--resume" in command))
        finish(folder, command[2 : command.index("--resume")] if "--resume" in command else command[2:])
        return argparse.Namespace(returncode=0)

    def finish(folder: Path, options: list[str]) -> None:
        begin(folder, options)
        (folder / "export").mkdir()
        (folder / "export" / "model_index.json").write_text("{}")

    def begin(folder: Path, options: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(parse_config(options)))
        lines = [{"iteration": i, "queries": 64, "eval/jpeg_compressibility/mean": -1.5 + i} for i in range(2)]
        shown = [{**line, "eval/shapes_alignment/mean": 0.4} for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shown))

    monkeypatch.setattr(runs, "_run", run)
    finish(tmp_path / "a" / "seed_0", two[0].arguments(0, tmp_path / "a" / "seed_0"))
    begin(tmp_path / "b" / "seed_0", two[1].arguments(0, tmp_path / "b" / "seed_0"))
    curves = arms.train_arms(two, arguments)
    assert sorted(started) == [("a/seed_1", False), ("b/seed_0", True), ("b/seed_1", False)]
    assert [row["forwards"] for row in curves["a"][1]] == [0, 640]
    assert curves["b"][0][1][arms.TOTAL] == pytest.approx(-0.5 + 0.25 * 0.4)
    other = [arms.Arm("a", "compressibility", ("num_iterations", "3"))]
    with pytest.raises(ValueError, match="num_iterations=2, but num_iterations=3"):
        arms.train_arms(other, arguments)


def test_the_sweep_chooses_the_rate_with_the_highest_reward(load: Callable[[str], ModuleType]):
    rows = [{"arm": a, "lr": lr, "reward": r} for a, lr, r in [("a", "1", 3.0), ("a", "2", 5.0), ("b", "1", 9.0)]]
    assert load("learning.arms").best_lr(rows, "a") == "2"


def test_a_sweep_of_arms_with_tasks_weighs_the_tasks_alike(load: Callable[[str], ModuleType]):
    arms = load("learning.arms")
    rows = [
        {"arm": "joint", "lr": "1", "task/a": 0.5, "task/b": -9.0},
        {"arm": "joint", "lr": "2", "task/a": 0.6, "task/b": -10.0},  # b's unit is ten times a's, its loss as large
        {"arm": "joint", "lr": "3", "task/a": 0.6, "task/b": -9.5},
        {"arm": "alone", "lr": "1", "task/b": -9.0},
        {"arm": "alone", "lr": "2", "task/b": -10.0},
    ]
    found = arms.with_rewards(rows)
    assert (arms.best_lr(found, "joint"), arms.best_lr(found, "alone")) == ("3", "1")
    assert arms.with_rewards([{"arm": "a", "lr": "1", "reward": 2.0}])[0]["reward"] == 2.0


def test_the_sweep_of_a_task_reads_what_it_optimises(load: Callable[[str], ModuleType], tmp_path: Path):
    arms = load("learning.arms")
    arm = next(arm for arm in load("learning.joint").arms() if arm.name == "compressibility")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(parse_config(arm.arguments(0, tmp_path / "run"))))
    keys = ("reward/compressibility/jpeg_compressibility/mean", "reward/compressibility/shapes_alignment/mean")
    lines = [{"iteration": i, "queries": i, **dict.fromkeys(keys, float(i))} for i in range(7)]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert arms._tuning_row(tmp_path / "run") == {"iterations": 7, "task/compressibility": 4.0 * 1.5}


def test_scores_of_several_processes_are_those_of_one(
    load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    exports, arms = load("learning.exports"), load("learning.arms")
    monkeypatch.setattr(exports, "_measured", lambda model, exam: {"model": model})
    arguments = argparse.Namespace(runs=tmp_path, seeds=[0, 1, 2])
    exam = exports.Exam("shapes:one", ["jpeg_compressibility"], num_steps=4, num_images=8)
    asked = ([arms.Arm("a", "joint"), arms.Arm("b", "joint")], arguments, exam)
    found = exports.scores_by_arm(*asked)  # kept, so that the other processes need not draw
    assert found == {
        name: [{"model": str(tmp_path / name / f"seed_{seed}" / "export")} for seed in range(3)] for name in "ab"
    }
    assert exports.scores_by_arm(*asked, jobs=2) == found


def test_a_figure_that_is_stopped_says_how_to_go_on(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def stopped(arguments: argparse.Namespace) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["joint.py"])
    assert load("learning.arms").run_figure("joint", None, stopped) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on from here\n"


def test_fairness_with_real_images_differs_by_nothing_else(load: Callable[[str], ModuleType]):
    fairness = load("learning.fairness")
    for alone, beside in zip(fairness.arms(), fairness.arms(l_pre=True), strict=True):
        configs = [parse_config(arm.arguments(0, Path("run"))) for arm in (alone, beside)]
        for config in configs:
            validate(config, 1)
        without, with_loss = (config.pretraining for config in configs)
        assert (without.data, without.weight) == ("", 0)
        assert (with_loss.data, with_loss.weight) == ("shapes:one", 1)
        assert replace(configs[0], pretraining=with_loss) == configs[1]


def test_a_gain_is_of_what_the_task_optimises(load: Callable[[str], ModuleType]):
    joint = load("learning.joint")
    tasks = yaml.safe_load((CONFIGS / "joint.yaml").read_text())["tasks"]
    weights = {
        task["name"]: {reward["name"]: reward.get("weight", 1.0) for reward in task["rewards"]} for task in tasks
    }
    assert {task: measured.weights for task, measured in joint.MEASURED.items()} == weights
    found = [
        {"jpeg_compressibility": size, "shapes_alignment": detector} for size, detector in [(-1.4, 0.9), (-1.2, 0.7)]
    ]
    gains = joint.gains_over_start({"start": found[:1], "mixed": found}, "compressibility")
    assert gains == {"mixed": [0.0, pytest.approx(0.2 - 0.5 * 0.2)]}
