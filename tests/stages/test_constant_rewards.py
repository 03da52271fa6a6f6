"""A reward that is the same for all images is warned of once, with its value and the way out."""

from __future__ import annotations

import pytest
import torch

from rlcm_fast import parallel
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


def look(iterations: list[dict[str, Rewards]]) -> None:
    watch = ConstantRewards()
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


def test_rewards_of_several_tasks_are_named_with_them(said: list[str]):
    look([{"a": rewards(jpeg=[1.0, 1.0]), "b": rewards(jpeg=[1.0, 2.0])}] * 2)
    assert [line.partition(" is ")[0] for line in said] == ["the reward a/jpeg"]
    assert "check-reward jpeg," in said[0]


def test_images_of_all_processes_count(said: list[str], monkeypatch: pytest.MonkeyPatch):
    other = torch.tensor([[[-3.0, 3.0], [-1.0, 1.0]]])  # minus the lowest, the highest score of the other process
    monkeypatch.setattr(parallel, "all_gather", lambda values: torch.cat([values, other]))
    look([{"one": rewards(jpeg=[1.0, 1.0], constant=[1.0, 1.0])}] * 2)
    assert [line.partition(" is ")[0] for line in said] == ["the reward constant"]
