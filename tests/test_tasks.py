"""Several tasks: whose prompts, whose rewards, whose statistics; and a run of them, mixed and one by one."""

from __future__ import annotations

import json
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_rewards
import tiny_runs
import torch

from rlcm_fast.config import Config, RolloutConfig, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve
from rlcm_fast.rewards import GroupReward
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.stages.evaluation_build import build_evaluation
from rlcm_fast.stages.task_gradients import gradient_metrics
from rlcm_fast.tasks import Tasks
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

BRIGHT = {"name": tiny_runs.REWARD}
SMALL = {"name": "jpeg_compressibility"}


def make_config(model: str, run_dir: Path, **settings: Any) -> Config:
    """Two tasks of four images each; settings: with __ for the dots."""
    prompts = Path(model) / "prompts.txt"
    tasks = [
        {"name": "bright", "source": str(prompts), "rewards": [BRIGHT], "advantages": "group"},
        {"name": "small", "source": str(prompts), "rewards": [SMALL, {**BRIGHT, "weight": 0.5}], "share": 1.0},
    ]
    values = {"prompts.num_prompts": 4, "update.micro_batch_size": 4, "tasks": tasks}
    values |= {name.replace("__", "."): value for name, value in settings.items()}
    if values["tasks"]:  # in the place of the tiny run's
        values |= {"prompts.source": "shapes:one", "rewards": []}
    return parse_config(tiny_runs.arguments(model, run_dir, values))


def test_each_image_is_scored_by_its_own_tasks_rewards(tiny_lcm_folder: str, tmp_path: Path):
    tasks = Tasks(resolve(make_config(tiny_lcm_folder, tmp_path), 1))
    prompts = tasks.next_batch(["bright", "small"])
    assert [prompt.task for prompt in prompts] == ["bright"] * 4 + ["small"] * 4
    images = torch.rand(8, 3, 16, 16)
    for rows in torch.arange(8).split(3):  # the second holds both tasks
        tasks.rewards.submit(images[rows], [prompts[i] for i in rows.tolist()])
    found = tasks.rewards.gather(0)
    tasks.rewards.shutdown()
    bright = tasks.trained["bright"][tiny_runs.REWARD][0](images, prompts)
    assert found["bright"].by_name.keys() == {tiny_runs.REWARD}
    assert found["small"].by_name.keys() == {"jpeg_compressibility", tiny_runs.REWARD}
    assert torch.equal(found["bright"].total, bright[:4])
    assert torch.equal(found["small"].total, found["small"].by_name["jpeg_compressibility"] + 0.5 * bright[4:])


def test_a_reward_of_one_task_is_watched_on_the_prompts_of_another(tiny_lcm_folder: str, tmp_path: Path):
    watched = [SMALL, {"name": "diversity"}]
    config = make_config(tiny_lcm_folder, tmp_path, evaluation__rewards=watched, evaluation__every=3)
    validate(config, 1)
    run = resolve(config, 1)
    tasks = Tasks(run)
    unused: Any = None  # a pipeline and an engine, which nothing asks for before images are drawn
    (evaluator,) = build_evaluation(run, tasks, unused, unused).evaluators
    tasks.rewards.shutdown()
    bright, small = evaluator.rewards["eval/bright"], evaluator.rewards["eval/small"]
    assert set(bright) == set(small) == {tiny_runs.REWARD, "jpeg_compressibility", "diversity"}
    assert bright["jpeg_compressibility"][0] is small["jpeg_compressibility"][0]
    assert small["jpeg_compressibility"] is tasks.trained["small"]["jpeg_compressibility"]


def test_a_model_is_built_once_whatever_its_weights_groups_and_credits(tiny_lcm_folder: str, tmp_path: Path):
    rewards = ({"name": "diversity", "group_size": 2}, {"name": "diversity", "weight": 3.0, "credit": "leave_one_out"})
    own = [{"name": f"{i}", "source": "shapes:one", "rewards": [r]} for i, r in enumerate(rewards)]
    tasks = Tasks(resolve(make_config(tiny_lcm_folder, tmp_path, tasks=own), 1))
    tasks.rewards.shutdown()
    first, second = (tasks.trained[name]["diversity"][0] for name in ("0", "1"))
    assert isinstance(first, GroupReward) and isinstance(second, GroupReward)
    assert (first.group_size, first.credit, second.group_size, second.credit) == (2, "group", 0, "leave_one_out")
    assert first.reward is second.reward


def test_advantages_are_of_a_tasks_own_statistics_and_survive_a_checkpoint(tiny_lcm_folder: str, tmp_path: Path):
    config = make_config(tiny_lcm_folder, tmp_path)
    tasks, apart = Tasks(resolve(config, 1)), Tasks(resolve(config, 1))
    prompts = tasks.next_batch(["bright", "small"])
    rewards = torch.tensor([1.0, 2.0, 5.0, 5.0, 100.0, 200.0, 300.0, 500.0])
    advantages = tasks.advantages(rewards, prompts)
    assert torch.equal(advantages[:4], apart.advantages(rewards[:4], prompts[:4]))
    assert torch.equal(advantages[4:], apart.advantages(rewards[4:], prompts[4:]))
    assert tasks.metrics(["bright", "small"]) == {"advantage/bright/zero_variance_groups": 0.5}
    state = json.loads(json.dumps(tasks.state_dict()))
    resumed = Tasks(resolve(config, 1))
    resumed.load_state_dict(state)
    assert resumed.next_batch(["small"]) == tasks.next_batch(["small"])
    assert torch.equal(resumed.advantages(rewards, prompts), tasks.advantages(rewards, prompts))
    one = Tasks(resolve(make_config(tiny_lcm_folder, tmp_path, tasks=[]), 1))
    with pytest.raises(ValueError, match="resume: the checkpoint is of tasks bright, small, and this run has default"):
        one.load_state_dict(state)


def test_without_tasks_the_labels_of_a_file_change_nothing(tiny_lcm_folder: str, tmp_path: Path):
    source = tmp_path / "labelled.jsonl"
    source.write_text('{"text": "a", "task": "x"}\n{"text": "b", "task": "y"}\n')
    rewards = [SMALL, {"name": "diversity", "group_size": 4}]
    own = {"prompts__num_prompts": 2, "prompts__source": source, "rewards": rewards}
    tasks = Tasks(resolve(make_config(tiny_lcm_folder, tmp_path, tasks=[], **own), 1))
    prompts = tasks.next_batch(["default"])
    assert {prompt.task for prompt in prompts} == {"x", "y"}
    tasks.rewards.submit(torch.rand(4, 3, 16, 16), prompts)
    found = tasks.rewards.gather(0)
    assert found.keys() == {"default"}
    assert found["default"].values["diversity"].unique().numel() == 1  # one group
    tasks.rewards.shutdown()


def test_the_models_of_all_rewards_are_told(tiny_lcm_folder: str, tmp_path: Path):
    """Those of the evaluation, too; rewards without models have none."""
    clip = tiny_rewards.save_clip(tmp_path / "clip")
    watched = [{"name": "pickscore", "arguments": {"model": clip}}]
    config = make_config(tiny_lcm_folder, tmp_path, evaluation__rewards=watched, evaluation__every=1)
    used = Tasks(resolve(config, 1)).models_used
    assert used.keys() == {"pickscore"}
    assert used["pickscore"]["model"]["model"] == clip
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= used["pickscore"]["model"]["files"].keys()


def test_groups_of_a_set_reward_never_cross_tasks(tiny_lcm_folder: str, tmp_path: Path):
    own = [{"name": name, "source": "shapes:one", "rewards": [{"name": "diversity"}]} for name in ("a", "b")]
    tasks = Tasks(resolve(make_config(tiny_lcm_folder, tmp_path, tasks=own), 1))
    prompts, images = tasks.next_batch(["a", "b"]), torch.rand(8, 3, 16, 16)
    for rows in torch.arange(8).split(3):  # the second holds both tasks
        tasks.rewards.submit(images[rows], [prompts[i] for i in rows.tolist()])
    found = tasks.rewards.gather(0)
    tasks.rewards.shutdown()
    diversity = tasks.trained["a"]["diversity"][0]
    for name, rows in {"a": slice(0, 4), "b": slice(4, 8)}.items():
        assert torch.equal(found[name].values["diversity"], diversity(images[rows], prompts[rows]))
    assert not torch.equal(found["a"].values["diversity"], found["b"].values["diversity"])


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("schedule", ["mixed", "by_task"])
def test_tasks_train_together_and_a_resumed_run_is_the_uninterrupted_one(
    schedule: str, tiny_lcm_folder: str, tmp_path: Path
):
    common = {"task_schedule": schedule, "evaluation__every": 3, "checkpoint__every": 1, "update__num_updates": 1}
    whole = Trainer(make_config(tiny_lcm_folder, tmp_path / "whole", **common))
    whole.run()
    lines = tiny_runs.metrics(tmp_path / "whole")
    assert [line["queries"] for line in lines] == [8, 16, 24, 24]
    assert {f"reward/{name}/mean" for name in (f"bright/{tiny_runs.REWARD}", "small/total")} <= lines[0].keys()
    assert {"gradient/bright/norm", "gradient/small/norm", "gradient/bright/small/cosine"} <= lines[0].keys()
    assert -1 <= lines[0]["gradient/bright/small/cosine"] <= 1
    assert {"eval/bright/diversity", "eval/small/jpeg_compressibility/mean"} <= lines[0].keys()
    assert whole.engine.lr < 1e-3

    cut = Trainer(make_config(tiny_lcm_folder, tmp_path / "cut", **common))
    update, calls = cut.updater.update, []

    def interrupted_update(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 * len(cut.tasks.rounds):  # the last round of the second iteration
            signal.raise_signal(signal.SIGINT)
        return update(*arguments)

    cut.updater.update = interrupted_update  # type: ignore[method-assign]
    cut.run()
    assert cut.iteration == (1 if schedule == "mixed" else 2), "once the first task has moved weights it is too late"
    resumed = Trainer(make_config(tiny_lcm_folder, tmp_path / "cut", **common, resume="latest"))
    resumed.run()
    weights = whole.engine.full_weights()
    assert all(torch.equal(value, weights[name]) for name, value in resumed.engine.full_weights().items())


def test_one_by_one_has_a_round_and_its_updates_for_every_task(tiny_lcm_folder: str, tmp_path: Path):
    mixed = resolve(make_config(tiny_lcm_folder, tmp_path), 1).sizes
    by_task = resolve(make_config(tiny_lcm_folder, tmp_path, task_schedule="by_task"), 1).sizes
    assert (mixed.samples_per_iteration, by_task.samples_per_iteration) == (8, 8)
    assert (mixed.samples_per_rollout, by_task.samples_per_rollout) == (8, 4)
    assert by_task.updates_per_iteration == 2 * mixed.updates_per_iteration
    assert by_task.transitions_per_update == mixed.transitions_per_update / 2


def test_norms_and_cosines_of_gradients():
    gradients = {
        "a": [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])],
        "b": [torch.tensor([0.0, 1.0]), torch.ones(1, 1)],
    }
    metrics = gradient_metrics(gradients)
    assert metrics == pytest.approx(
        {"gradient/a/norm": 5.0, "gradient/b/norm": math.sqrt(2), "gradient/a/b/cosine": 4 / (5 * math.sqrt(2))}
    )
    assert gradient_metrics({"a": [torch.ones(1)], "b": [torch.zeros(1)]})["gradient/a/b/cosine"] == 0.0


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"name": "small"}, r"tasks\[1\].name=small is already that of another task"),
        ({"name": "a/b"}, r"tasks\[0\].name='a/b' is no name"),
        ({"share": 0.0}, r"tasks\[0\].share=0.0 is out of range"),
        ({"share": 2.5}, r"tasks\[0\].share=2.5 gives task bright 2.85714 prompts with 2 images each of the 8 images"),
        ({"rewards": []}, r"tasks\[0\].rewards=\[\] leaves nothing to optimise"),
        (
            {"share": 1 / 7, "images_per_prompt": 1, "advantages": "batch"},
            r"tasks\[0\].share=0.14.* gives task bright one image, so no spread of rewards",
        ),
        ({"images_per_prompt": 1}, r"tasks\[0\].images_per_prompt=1 makes no group for tasks\[0\].advantages=group"),
    ],
)
def test_a_task_that_cannot_be_is_one_line(change: dict[str, Any], problem: str, tiny_lcm_folder: str, tmp_path: Path):
    prompts = str(Path(tiny_lcm_folder) / "prompts.txt")
    tasks: list[dict[str, Any]] = [
        {"name": "bright", "source": prompts, "rewards": [BRIGHT], "advantages": "group", **change},
        {"name": "small", "source": prompts, "rewards": [SMALL]},
    ]
    with pytest.raises(ValueError, match=problem):
        validate(make_config(tiny_lcm_folder, tmp_path, tasks=tasks), 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (
            {"rewards": [BRIGHT, {"name": "jpeg_compressibility", "arguments": {"quality": 0}}]},
            r"^tasks\[1\].rewards\[1\]: name=jpeg_compressibility arguments=\{'quality': 0\}: ",
        ),
        (
            {"rewards": [{**SMALL, "group_size": 2}]},
            r"^tasks\[1\].rewards\[0\]: name=jpeg_compressibility group_size=2 has no use",
        ),
        (
            {"rewards": [BRIGHT, {"name": "diversity"}], "advantages": "batch"},
            r"^tasks\[1\].rewards\[1\].credit=group of diversity in groups of 4 gives the same to all 4 images",
        ),
        (
            {"images_per_prompt": 1, "share": 3.0},
            r"^tasks\[1\].source=.*prompts.txt holds 5 prompts, fewer than the 6",
        ),
    ],
)
def test_a_task_that_cannot_be_made_is_named_before_weights_load(
    change: dict[str, Any], problem: str, tiny_lcm_folder: str, tmp_path: Path
):
    prompts = str(Path(tiny_lcm_folder) / "prompts.txt")
    tasks: list[dict[str, Any]] = [
        {"name": "bright", "source": prompts, "rewards": [BRIGHT]},
        {"name": "small", "source": prompts, "rewards": [SMALL], **change},
    ]
    with pytest.raises(ValueError, match=problem):
        Tasks(resolve(make_config(tiny_lcm_folder, tmp_path, tasks=tasks), 1))


@pytest.mark.parametrize(
    ("kind", "reward", "refused"),
    [
        ("batch", "{name: diversity}", "groups of 64 gives the same to all 64 images"),
        ("batch", "{name: diversity, group_size: 32}", None),
        ("batch", "{name: diversity, credit: leave_one_out}", None),
        ("group", "{name: diversity, group_size: 8}", "groups of 8 gives the same to all 4 images"),
        ("leave_one_out", "{name: diversity, group_size: 4}", "advantages.kind=leave_one_out compares; set credit"),
        ("group", "{name: diversity, group_size: 2}", None),
        ("prompt", "{name: diversity}", None),
    ],
)
def test_a_reward_that_leaves_nothing_to_compare_is_refused(kind: str, reward: str, refused: str | None):
    config = parse_config(["--rewards", f"[{reward}]", "--advantages.kind", kind])
    if refused is None:
        Tasks(resolve(config, 1)).rewards.shutdown()
    else:
        with pytest.raises(ValueError, match=refused):
            Tasks(resolve(config, 1))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_tasks_that_share_a_reward_call_it_from_the_same_workers(num_workers: int):
    lock, running, most = threading.Lock(), 0, 0

    def reward(images: torch.Tensor, prompts: object) -> torch.Tensor:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.1)
        with lock:
            running -= 1
        return images.mean(dim=(1, 2, 3))

    trained = {task: {"mean": (reward, 1.0)} for task in ("a", "b", "c")}
    rewards = TaskRewards(trained, RolloutConfig(reward_workers=num_workers), lambda prompt: prompt.task)
    rewards.submit(torch.ones(3, 3, 2, 2), [Prompt("x", task) for task in trained])
    scores = rewards.gather(0)
    rewards.shutdown()
    assert {task: found.total.tolist() for task, found in scores.items()} == {"a": [1.0], "b": [1.0], "c": [1.0]}
    assert most <= num_workers
