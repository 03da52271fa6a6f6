"""A reward that is the same for all images is warned of once, with its value and the way out."""

from __future__ import annotations

import pytest
import torch

from rlcm_fast import parallel
from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.rewards import Rewards
from rlcm_fast.stages import constant_rewards
from rlcm_fast.stages.constant_rewards import ConstantRewards

NAN = float("nan")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(constant_rewards, "say", lines.append)
    return lines


def rewards(**scores: list[float]) -> Rewards:
    tensors = {name: torch.tensor(values) for name, values in scores.items()}
    return Rewards(tensors, tensors, sum(tensors.values()), 0.0)  # pyright: ignore[reportArgumentType]


def look(iterations: list[dict[str, Rewards]], *named: str) -> None:
    watch = ConstantRewards(validate(parse_config(list(named)), 1) if named else None)
    for iteration, of_tasks in enumerate(iterations):
        watch.look(of_tasks, iteration)


def test_a_constant_reward_is_said_once_with_its_value_and_the_way_out(said: list[str]):
    look([{"one": rewards(jpeg=[0.25, 0.25], other=[1.0, 2.0])}] * 5)
    (line,) = said
    assert line.startswith("the reward jpeg is 0.25 for every image of iterations 1 and 2: it gives no advantage")
    assert "rlcm-fast check-reward jpeg, or drop it" in line


def test_one_iteration_and_another_value_are_chance(said: list[str]):
    look([{"one": rewards(jpeg=values)} for values in ([0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.5])])
    assert said == []


def test_what_is_missing_does_not_count(said: list[str]):
    look([{"one": rewards(jpeg=[NAN, 2.0, 2.0])}] * 2)
    assert len(said) == 1
    look([{"one": rewards(jpeg=[NAN, NAN])}] * 3)
    assert len(said) == 1


def test_a_person_may_let_all_images_tie(said: list[str]):
    watch = ConstantRewards()
    for iteration in range(3):
        watch.look({"default": rewards(human=[0.0, 0.0], jpeg=[1.0, 1.0])}, iteration, {("default", "human")})
    assert [line.partition(" is ")[0] for line in said] == ["the reward jpeg"]
    watch.look({"default": rewards(human=[0.0, 0.0])}, 3, {("default", "human")})


def test_rewards_of_several_tasks_are_named_with_them(said: list[str]):
    look([{"a": rewards(jpeg=[1.0, 1.0]), "b": rewards(jpeg=[1.0, 2.0])}] * 2)
    assert [line.partition(" is ")[0] for line in said] == ["the reward a/jpeg"]
    assert "check-reward jpeg," in said[0]


def test_the_way_out_names_the_class_behind_a_label_and_its_arguments(said: list[str]):
    pack = "--rewards=[{name: jpeg_compressibility, label: mine, arguments: {quality: 50}}, {name: a:B, label: c}]"
    look([{"default": rewards(mine=[1.0, 1.0], c=[2.0, 2.0])}] * 2, pack)
    assert said[0].startswith("the reward mine is 1 for every image")
    assert """, try rlcm-fast check-reward jpeg_compressibility --arguments '{"quality": 50}', or drop it""" in said[0]
    assert "try rlcm-fast check-reward a:B, or" in said[1]


def test_an_object_of_a_program_is_not_called_by_a_command(said: list[str]):
    look([{"default": rewards(mine=[1.0, 1.0])}] * 2, "--rewards=[{name: 'python:f', label: mine}]")
    assert said[0].endswith("teaches nothing; look at the images, or drop it")


def test_tasks_that_take_turns_are_told_apart(said: list[str]):
    tasks = "--tasks=[{name: a, source: 'shapes:one', rewards: [{name: jpeg_compressibility, label: x}]},"
    tasks += " {name: b, source: 'shapes:one', rewards: [{name: shapes_alignment, label: x}]}]"
    turns = [{task: rewards(x=[value, value])} for task, value in (("a", 1.0), ("b", 1.0), ("a", 2.0), ("b", 1.0))]
    look(turns, tasks, "--task_schedule=by_task", "--update.micro_batch_size=48")
    assert [line.partition(" is ")[0] for line in said] == ["the reward b/x"]
    assert "check-reward shapes_alignment, or" in said[0]


def test_images_of_all_processes_count(said: list[str], monkeypatch: pytest.MonkeyPatch):
    other = torch.tensor([[[-3.0, 3.0], [-1.0, 1.0]]])  # minus the lowest, the highest score of the other process
    monkeypatch.setattr(parallel, "all_gather", lambda values: torch.cat([values, other]))
    look([{"one": rewards(jpeg=[1.0, 1.0], constant=[1.0, 1.0])}] * 2)
    assert [line.partition(" is ")[0] for line in said] == ["the reward constant"]
