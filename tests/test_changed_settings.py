"""Runs that resume with changed settings: each takes effect, is handled, or ends the start with one line.

tests/run_folder/test_rules.py has the rules alone.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import for_cpu
from rlcm_fast.config.checks import validate
from rlcm_fast.faults import SharedMistake
from rlcm_fast.run_folder import resume as resuming
from rlcm_fast.run_folder.resume import begin
from rlcm_fast.run_folder.rules import RULES
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
SETTINGS = {"num_iterations": 2, "checkpoint.every": 1, "optimizer.warmup_updates": 0}
LAST = "iteration_000002"


def make_config(model: str, run_dir: Path, **settings: object) -> Config:
    """What a run on a CPU begins with. settings: with __ for the dots."""
    named = {**SETTINGS, **{name.replace("__", "."): value for name, value in settings.items()}}
    config = parse_config(tiny_runs.arguments(model, run_dir, named))
    validate(config, 1)
    return for_cpu(config)


def trained(model: str, run_dir: Path, **settings: object) -> Trainer:
    trainer = Trainer(make_config(model, run_dir, **settings))
    trainer.run()
    return trainer


@pytest.fixture(scope="module")
def finished(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two iterations, which tests copy."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    trained(tiny_lcm_folder, run_dir)
    return run_dir


@pytest.fixture(scope="module")
def with_adapters(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("adapters") / "run"
    trained(tiny_lcm_folder, run_dir, lora__rank=2)
    return run_dir


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a start says."""
    lines: list[str] = []
    monkeypatch.setattr(resuming, "say", lines.append)
    return lines


def refusal(config: Config) -> str:
    """What ends the start; the folder is free afterwards."""
    with pytest.raises(SharedMistake) as caught:
        begin(config)
    assert not (Path(config.run_dir) / "lock").exists()
    return str(caught.value)


def test_nothing_changed_is_nothing_said(tiny_lcm_folder: str, run_dir: Path, said: list[str]):
    begin(make_config(tiny_lcm_folder, run_dir, resume="latest")).close()
    again = "evaluating and exporting again; raise num_iterations to train"
    assert said == [f"{run_dir}/checkpoints/{LAST} has all 2 iterations: {again}"]


# Field -> another value, and what else must change for it.
REFUSED: dict[str, tuple[object, dict[str, object]]] = {
    "policy.kind": ("ddim", {}),
    "optimizer.name": ("adamw_8bit", {}),
    "ema.decay": (0.9, {}),
    "lora.rank": (2, {}),
}
REFUSED_OF_ADAPTERS: dict[str, tuple[object, dict[str, object]]] = {
    "lora.rank": (4, {}),
    "lora.alpha": (64.0, {}),
    "lora.targets": (["to_q"], {}),
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_a_checkpoint_cannot_go_on_with_is_refused_before_weights_load(
    tiny_lcm_folder: str, run_dir: Path, field: str
):
    value, more = REFUSED[field]
    settings = {"resume": "latest", field.replace(".", "__"): value, **more}
    message = refusal(make_config(tiny_lcm_folder, run_dir, **settings))
    assert message.startswith(f"{field}={value} does not go with the checkpoint's ")
    assert f"; keep {field}=" in message
    assert "start a new run from" in message


@pytest.mark.parametrize("field", REFUSED_OF_ADAPTERS)
def test_adapters_go_on_only_as_they_were_trained(
    tiny_lcm_folder: str, with_adapters: Path, tmp_path: Path, field: str
):
    run_dir = shutil.copytree(with_adapters, tmp_path / "run")
    value, _ = REFUSED_OF_ADAPTERS[field]
    config = make_config(
        tiny_lcm_folder, run_dir, resume="latest", **{"lora__rank": 2, field.replace(".", "__"): value}
    )
    assert refusal(config).startswith(f"{field}={value} does not go with the checkpoint's ")


def test_another_model_is_refused_and_a_moved_one_is_the_same(
    tiny_lcm_folder: str, tiny_sd_folder: str, run_dir: Path, tmp_path: Path, said: list[str]
):
    message = refusal(make_config(tiny_sd_folder, run_dir, resume="latest", num_iterations=3))
    assert message.startswith(f"model.path={tiny_sd_folder} does not go with the checkpoint's {tiny_lcm_folder}: ")
    copied = str(shutil.copytree(tiny_lcm_folder, tmp_path / "copied", copy_function=shutil.copy2))
    settings = {"prompts__source": Path(tiny_lcm_folder) / "prompts.txt", "resume": "latest"}
    begin(make_config(copied, run_dir, **settings, num_iterations=3)).close()
    assert f"changed since the checkpoint: model.path {tiny_lcm_folder} -> {copied}" in said


def test_a_model_whose_files_changed_under_its_name_is_refused(tiny_lcm_folder: str, tmp_path: Path, said: list[str]):
    model, run_dir = str(shutil.copytree(tiny_lcm_folder, tmp_path / "model")), tmp_path / "run"
    trained(model, run_dir)
    config = make_config(model, run_dir, resume="latest", num_iterations=3)
    file = Path(model) / "scheduler" / "scheduler_config.json"
    text = file.read_text()
    file.touch()
    begin(config).close()
    assert said[-1].startswith(f"model.path={model} has files of another time, with the size and tensors that")
    file.write_text(text + "\n")
    assert refusal(config).startswith(
        f"model.path={model} is not the model that the checkpoint was trained from: pipeline scheduler/scheduler_config"
        f".json ({len(text)} bytes, now {len(text) + 1}); put it back, or start a new run"
    )


def test_fewer_iterations_than_are_finished_are_refused(tiny_lcm_folder: str, run_dir: Path):
    message = refusal(make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=1))
    assert message.startswith("num_iterations=1 is fewer than the 2 that ")


def test_more_iterations_let_a_falling_learning_rate_jump_up_and_both_numbers_are_said(
    tiny_lcm_folder: str, run_dir: Path, said: list[str]
):
    trainer = trained(tiny_lcm_folder, run_dir, resume="latest", num_iterations=4)
    assert "changed since the checkpoint: num_iterations 2 -> 4" in said
    assert "learning rate of the next update: 0.0001 -> 0.00055, by the changed settings" in said
    assert trainer.iteration == 4


def buffers(trainer: Trainer) -> int:
    return len(trainer.tasks.advantages.state_dict()["buffers"])


def test_the_buffers_of_another_reward_are_emptied_and_the_prompts_go_on(
    tiny_lcm_folder: str, run_dir: Path, said: list[str]
):
    rewards = [{"name": tiny_runs.REWARD, "weight": 2.0}]
    same = Trainer(make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=3))
    other = Trainer(make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=3, rewards=rewards))
    assert (buffers(same), buffers(other)) == (4, 0)
    assert same.tasks.next_batch(["default"]) == other.tasks.next_batch(["default"])
    assert any(line.endswith("weight 1.0 -> 2.0; the advantage buffers of its task are emptied") for line in said)


def test_of_tasks_only_those_whose_rewards_changed_forget_them(tiny_lcm_folder: str, tmp_path: Path, said: list[str]):
    source = str(Path(tiny_lcm_folder) / "prompts.txt")

    def settings(weight: float, third: str) -> dict[str, Any]:
        rewards = [{"name": tiny_runs.REWARD, "weight": weight}]
        tasks = [{"name": name, "source": source, "rewards": rewards if name == "b" else rewards[:1]} for name in "ab"]
        tasks[0]["rewards"] = [{"name": tiny_runs.REWARD}]
        more = {"name": third, "source": source, "rewards": tasks[0]["rewards"]}
        return {
            "tasks": [*tasks, more],
            "rewards": [],
            "prompts.num_prompts": 3,
            "update.micro_batch_size": 3,
            "advantages.min_count": 2,
            "prompts.source": "shapes:one",
        }

    trained(tiny_lcm_folder, tmp_path / "run", **settings(1.0, "c"))
    config = make_config(tiny_lcm_folder, tmp_path / "run", **settings(2.0, "d"), resume="latest", num_iterations=3)
    state = Trainer(config).tasks.state_dict()
    counts = {name: len(of_task["buffers"]) for name, of_task in state["advantages"].items()}
    assert counts["a"] > 0
    assert (counts["b"], counts["d"]) == (0, 0)
    batches = {name: cursor["num_batches"] for name, cursor in state["prompts"].items()}
    assert batches == {"a": 2, "b": 2, "d": 0}
    assert sum(line.startswith("changed since the checkpoint: tasks[") for line in said) == 3


def test_an_old_checkpoint_says_that_its_settings_cannot_be_compared(
    tiny_lcm_folder: str, run_dir: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
):
    original = resuming.checkpoints.read_state

    def without_fingerprint(folder: Path) -> dict[str, Any]:
        state = original(folder)
        return {name: value for name, value in state.items() if name not in ("fingerprint", "rollout_noise")}

    monkeypatch.setattr(resuming.checkpoints, "read_state", without_fingerprint)
    trainer = Trainer(make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=3))
    assert trainer.iteration == 2
    assert any("does not say what it was trained with: its settings cannot be compared" in line for line in said)
    assert any("drew the noise of rollouts in another way" in line for line in said)


def test_another_negative_prompt_empties_the_buffers(tiny_sd_folder: str, tmp_path: Path, said: list[str]):
    settings = {"policy__kind": "ddim", "update__num_updates": 1}
    trained(tiny_sd_folder, tmp_path / "run", **settings)
    again = {"resume": "latest", "num_iterations": 3, "prompts__negative": "blurry", "prompts__long": "chunks"}
    trainer = Trainer(make_config(tiny_sd_folder, tmp_path / "run", **settings, **again))
    assert buffers(trainer) == 0
    fate = "images change at once, so the advantage buffers are emptied"
    assert f"changed since the checkpoint: prompts.negative  -> blurry; {fate}" in said
    assert f"changed since the checkpoint: prompts.long cut -> chunks; {fate}" in said


def test_gone_checkpoints_with_metrics_are_refused_and_without_them_it_starts_at_0(
    tiny_lcm_folder: str, run_dir: Path, said: list[str]
):
    config = make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=3)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints" / "iteration_x").mkdir(parents=True)
    lines = (run_dir / "metrics.jsonl").read_text()
    assert refusal(config).startswith(
        f"resume=latest finds no whole checkpoint in {run_dir}/checkpoints, and its 2 lines"
    )
    assert (run_dir / "metrics.jsonl").read_text() == lines
    (run_dir / "metrics.jsonl").unlink()
    begin(config).close()
    assert said == [f"run_dir={run_dir} has no checkpoint and no metrics: starting at 0"]


def test_a_run_that_ended_before_its_first_checkpoint_begins_anew_and_keeps_its_lines(
    tiny_lcm_folder: str, run_dir: Path, said: list[str]
):
    # The run says itself when its first checkpoint was due; the new start may want another number.
    config = make_config(tiny_lcm_folder, run_dir, resume="latest", num_iterations=3)
    shutil.rmtree(run_dir / "checkpoints")
    own, lines = run_dir / "config.yaml", (run_dir / "metrics.jsonl").read_text() + '{"iteration": 1, "rew'
    assert "\n  every: 1\n" in own.read_text()
    own.write_text(own.read_text().replace("\n  every: 1\n", "\n  every: 50\n"))
    for number in (1, 2):
        (run_dir / "metrics.jsonl").write_text(lines)
        begin(config).close()
        assert (run_dir / f"metrics.jsonl.{number}").read_text() == lines
        assert not (run_dir / "metrics.jsonl").exists()
        assert said[-1] == (
            f"run_dir={run_dir} ended before its first checkpoint: starting at 0; its metrics are in"
            f" metrics.jsonl.{number}"
        )
    (run_dir / "metrics.jsonl").write_text('{"iteration": 50}\n')
    assert "of a run that had some; put the checkpoints back" in refusal(config)


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tiny_lcm_folder: str, run_dir: Path, said: list[str]):
    (run_dir / "checkpoints" / LAST / "state.json").write_text("")
    trainer = Trainer(make_config(tiny_lcm_folder, run_dir, resume="latest"))
    assert trainer.iteration == 1
    assert "state.json is empty" in said[0]


def test_what_resume_names_must_be_a_whole_checkpoint_of_this_run_or_go_into_a_new_folder(
    tiny_lcm_folder: str, run_dir: Path, tmp_path: Path, said: list[str]
):
    model, old = tiny_lcm_folder, run_dir / "checkpoints" / "iteration_000001"
    assert "resume=latest finds no run in" in refusal(make_config(model, tmp_path / "typo", resume="latest"))
    assert not (tmp_path / "typo").exists()
    assert refusal(make_config(model, run_dir)).startswith(f"run_dir={run_dir} already holds a run; go on with --resu")
    assert "state.json is missing; give latest" in refusal(make_config(model, run_dir, resume=run_dir))
    other = shutil.copytree(old, tmp_path / "iteration_000001")
    message = refusal(make_config(model, run_dir, resume=other))
    assert message.startswith(f"resume={other} is another run's checkpoint, and run_dir={run_dir} already holds a run")
    begin(make_config(model, tmp_path / "new", resume=other)).close()
    begin(make_config(model, run_dir, resume=old)).close()
    assert said == [f"going back to iteration_000001: the next checkpoint deletes {LAST}; later metrics are dropped"]


def test_weights_alone_start_a_new_run_at_0(tiny_lcm_folder: str, finished: Path, tmp_path: Path, said: list[str]):
    config = make_config(
        tiny_lcm_folder,
        tmp_path / "new",
        resume_weights_only=finished,
        optimizer__name="adamw_8bit",
        update__kl_weight=0.1,
        update__num_updates=1,
    )
    trainer = Trainer(config)
    saved = load_file(finished / "checkpoints" / LAST / "unet.safetensors")
    weights = trainer.engine.full_weights()
    assert all(torch.equal(weights[name], value) for name, value in saved.items())
    assert (trainer.iteration, trainer.queries, buffers(trainer)) == (0, 0, 0)
    assert said == [f"starting at 0 from the trained weights of {finished}/checkpoints/{LAST}"]
    trainer.run()
    assert [line["iteration"] for line in tiny_runs.metrics(tmp_path / "new")] == [0, 1]
    assert tiny_runs.metrics(tmp_path / "new")[0]["kl_to_start"] < 1e-6


def test_all_weights_may_get_adapters_and_adapters_need_theirs(
    tiny_lcm_folder: str, finished: Path, with_adapters: Path, tmp_path: Path
):
    model, checkpoints = tiny_lcm_folder, with_adapters / "checkpoints"
    on_top = Trainer(make_config(model, tmp_path / "a", resume_weights_only=finished, lora__rank=2))
    saved = load_file(finished / "checkpoints" / LAST / "unet.safetensors")
    weights = on_top.engine.full_weights()
    assert all(torch.equal(weights[name], saved[name]) for name in weights.keys() & saved.keys())

    again = Trainer(make_config(model, tmp_path / "b", resume_weights_only=checkpoints, lora__rank=2))
    weights, saved = again.engine.full_weights(), load_file(checkpoints / LAST / "adapters.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in saved.items())
    assert any(value.abs().max() > 0 for name, value in saved.items() if "lora_B" in name)

    def refused(**settings: object) -> str:
        return refusal(make_config(model, tmp_path / "c", resume_weights_only=checkpoints, **settings))

    assert f"{checkpoints} holds adapters of rank 2, and lora.rank=0; set lora.rank=2, or give an export" in refused()
    assert "holds adapters of rank 2, and lora.rank=4; set lora.rank=2" in refused(lora__rank=4)
    assert "would make them 4 times as strong; set lora.alpha=16.0" in refused(lora__rank=2, lora__alpha=64.0)
    fewer = make_config(model, tmp_path / "c", resume_weights_only=checkpoints, lora__rank=2, lora__targets=["to_q"])
    with pytest.raises(ValueError, match="does not fit this model: .* is missing or has another shape, for example"):
        Trainer(fewer)


def test_weights_alone_and_resume_exclude_each_other(tiny_lcm_folder: str, finished: Path, tmp_path: Path):
    for settings, message in (
        ({"resume": "latest", "resume_weights_only": finished}, "leave out one of them"),
        ({"resume_weights_only": tmp_path / "nowhere"}, "nowhere is no folder; give a checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            make_config(tiny_lcm_folder, tmp_path / "new", **settings)
    empty = make_config(tiny_lcm_folder, tmp_path / "new", resume_weights_only=tmp_path)
    assert "holds no checkpoint; give a folder with state.json" in refusal(empty)


def test_the_second_start_in_a_folder_ends_with_one_line_and_exit_code_2(
    tiny_lcm_folder: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from rlcm_fast.run_folder import lock
    from rlcm_fast.train import main

    held = {**lock._machine(), "pid": 1, "process_start": lock.psutil.Process(1).create_time(), "token": "x"}
    (run_dir / "lock").write_text(json.dumps(held))
    more: Mapping[str, object] = {**SETTINGS, "resume": "latest"}
    assert main(tiny_runs.arguments(tiny_lcm_folder, run_dir, more)) == 2
    line = capsys.readouterr().err.strip()
    assert line.startswith(f"error: run_dir={run_dir} is in use by process 1 on ")
    assert "\n" not in line


def test_deterministic_algorithms_alone_change_no_number_on_a_cpu(
    tiny_lcm_folder: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    try:
        trained(tiny_lcm_folder, tmp_path / "run", engine__deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
        assert (torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark) == (True, False)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
    assert tiny_runs.metrics(tmp_path / "run") == tiny_runs.metrics(finished)
    with pytest.raises(ValueError, match="xformers sums gradients in no fixed order, so engine.deterministic=true"):
        make_config(tiny_lcm_folder, tmp_path / "x", engine__deterministic=True, engine__attention="xformers")


EVERY: dict[str, tuple[object, dict[str, object]]] = {
    "model.clip_skip": (1, {}),
    "model.image_size": (32, {}),
    "model.image_sizes": ([[16, 16], [24, 16]], {}),
    "model.vae_dtype": ("bf16", {}),
    "policy.num_steps": (5, {}),
    "policy.timesteps": ([999, 499, 249], {}),
    "policy.guidance_scale": (2.0, {}),
    "policy.eta": (0.5, {}),
    "policy.last_step": ("sampled", {}),
    "policy.last_sigma": (0.2, {}),
    "rollout.micro_batch_size": (4, {}),
    "rollout.shared_noise": (True, {}),
    "rollout.decode_batch_size": (1, {}),
    "rollout.max_skipped": (0.5, {}),
    "rollout.reward_timeout": (60.0, {}),
    "prompts.source": ("shapes:one", {}),
    "prompts.num_prompts": (4, {}),
    "prompts.images_per_prompt": (4, {}),
    "prompts.long": ("chunks", {}),
    "prompts.max_chunks": (3, {"prompts.long": "chunks"}),
    "task_schedule": ("by_task", {"tasks": None}),
    "advantages.kind": ("group", {}),
    "advantages.scale": ("group", {}),
    "advantages.buffer_size": (4, {}),
    "advantages.min_count": (2, {}),
    "algorithm.name": ("rebel", {}),
    "algorithm.eta": (2.0, {}),
    "algorithm.temperature": (2.0, {}),
    "update.clip_range": (2e-2, {}),
    "update.advantage_clip": (5.0, {}),
    "update.num_passes": (2, {}),
    "update.num_updates": (1, {}),
    "update.num_timesteps": (1, {}),
    "update.order": ("by_step", {}),
    "update.micro_batch_size": (4, {}),
    "update.old_log_probs": ("recompute", {}),
    "update.step_weights": ("sensitivity", {}),
    "update.max_grad_norm": (0.5, {}),
    "update.kl_weight": (0.1, {}),
    "update.rollout_lag": (1, {}),
    "update.max_skipped_updates": (5, {}),
    "update.kl_reference": ("offload", {"update__kl_weight": 0.1}),
    "pretraining.data": ("shapes:all", {"pretraining__weight": 0.1}),
    "pretraining.weight": (0.1, {"pretraining__data": "shapes:all"}),
    "pretraining.batch_size": (4, {}),
    "pretraining.micro_batch_size": (4, {}),
    "pretraining.caption_dropout": (0.2, {}),
    "pretraining.max_unreadable": (0.5, {}),
    "optimizer.name": ("adam", {}),
    "optimizer.lr": (5e-4, {}),
    "optimizer.betas": ([0.8, 0.99], {}),
    "optimizer.eps": (1e-7, {}),
    "optimizer.weight_decay": (0.1, {}),
    "optimizer.warmup_updates": (7, {}),
    "optimizer.final_lr_fraction": (1.0, {}),
    "engine.zero_stage": (1, {}),
    "engine.dtype": ("bf16", {"engine__zero_stage": 1}),
    "engine.kernels": ("torch", {}),
    "engine.offload_optimizer": (True, {"engine__zero_stage": 1}),
    "engine.recompute": ("block", {}),
    "engine.channels_last": (True, {}),
    "engine.group_norm": ("fused", {}),
    "engine.graphs": ("auto", {}),
    "engine.deterministic": (True, {}),
    "engine.offload_idle": (True, {}),
    "evaluation.every": (2, {}),
    "evaluation.num_images": (2, {}),
    "evaluation.prompts": ("shapes:one:held_out", {}),
    "evaluation.micro_batch_size": (3, {}),
    "evaluation.seed": (5, {}),
    "guard.action": ("warn", {"guard.every": 2}),
    "guard.watch": (["held_out"], {}),
    "guard.acts_on": (["all"], {}),
    "guard.every": (2, {}),
    "guard.z": (2.0, {}),
    "guard.floor": (0.1, {}),
    "guard.floors": ({"saturation": 0.5}, {}),
    "guard.max_kl": (0.1, {}),
    "guard.embedding": ("rlcm_fast.rewards.diversity:Thumbnails", {}),
    "checkpoint.best": ("eval/diversity", {"evaluation__every": 1}),
    "rewards_combine": ("normalised", {}),
    "num_iterations": (3, {}),
    "seed": (1, {}),
}
# Whose tests are others: lists, what needs a GPU, a compiler or another base, what a test above resumes.
ELSEWHERE = {"prompts.negative", "ema.device", "engine.attention", "engine.compile", "engine.optimizer_in_backward"}


def test_every_field_that_takes_effect_is_resumed_with():
    by_name = {name for name, rule in RULES.items() if "[]" in name and rule.kind != "silent"}
    named = {*EVERY, *REFUSED, *REFUSED_OF_ADAPTERS, *ELSEWHERE, "model.path", "model.revision"}
    of_other_files = {f"model.{name}" for name in ("base", "lora", "loras", "vae", "variant", "prediction")}
    assert named | by_name | of_other_files == {name for name, rule in RULES.items() if rule.kind != "silent"}


@pytest.mark.slow
@pytest.mark.parametrize("field", EVERY)
def test_a_run_goes_on_with_another_value_and_says_so(tiny_lcm_folder: str, run_dir: Path, said: list[str], field: str):
    value, more = EVERY[field]
    if field == "engine.offload_optimizer" and shutil.which("c++") is None:
        pytest.skip("no compiler for DeepSpeedCPUAdam")
    if "tasks" in more:
        source = str(Path(tiny_lcm_folder) / "prompts.txt")
        tasks = [{"name": name, "source": source, "rewards": [{"name": tiny_runs.REWARD}]} for name in "ab"]
        more = {
            "tasks": tasks,
            "rewards": [],
            "prompts.source": "shapes:one",
            "update.num_updates": 1,
            "advantages.kind": "batch",
        }
    settings = {"num_iterations": 3, **more, field: value}
    try:
        trainer = trained(tiny_lcm_folder, run_dir, resume="latest", **settings)
    finally:
        torch.use_deterministic_algorithms(False)
    assert trainer.iteration == 3
    shown = value if field == "num_iterations" else json.loads(json.dumps(value))
    assert any(line.startswith(f"changed since the checkpoint: {field} ") and f"-> {shown}" in line for line in said)


@pytest.mark.slow
def test_8_bit_states_go_on_with_other_weights_and_another_moment_of_the_step(tiny_lcm_folder: str, tmp_path: Path):
    """From DeepSpeed's engine to the direct one, to its steps in the backward pass, and back."""
    common: dict[str, Any] = {"optimizer__name": "adamw_8bit", "update__micro_batch_size": 4}
    pure = {"engine__dtype": "pure_bf16"}
    trained(tiny_lcm_folder, tmp_path / "run", **common)
    for count, engine in enumerate(({**pure}, {**pure, "engine__optimizer_in_backward": True}, {}), start=3):
        config = {**common, **engine, "resume": "latest", "num_iterations": count}
        trainer = trained(tiny_lcm_folder, tmp_path / "run", **config)
        assert trainer.iteration == count
