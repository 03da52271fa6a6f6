"""An image without a score has no advantage and no weight, and nothing else notices that it was ever there."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, engine_of, policy_of, trajectory_of
from torch import Tensor

from rlcm_fast.algorithms import TaskAdvantages, build_advantages, build_algorithm
from rlcm_fast.config import AdvantagesConfig, AlgorithmConfig, UpdateConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.update import Updater
from rlcm_fast.trajectory import Prompt, Trajectory

CAT, DOG, FOX = Prompt("a cat"), Prompt("a dog"), Prompt("a fox")
PROMPTS = [CAT, CAT, CAT, DOG, DOG, DOG, FOX, FOX]
REWARDS = torch.tensor([1.0, 5.0, 2.0, 7.0, math.nan, 3.0, math.nan, 4.0])
KINDS = ["prompt", "batch", "group", "leave_one_out"]


def without(rewards: Tensor, prompts: list[Prompt]) -> tuple[Tensor, list[Prompt]]:
    """The batch that never had the images without a score."""
    scored = (~rewards.isnan()).nonzero()[:, 0].tolist()
    return rewards[scored], [prompts[place] for place in scored]


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_others_have_the_advantages_of_a_batch_without_it(kind: str, scale: Any):
    config = AdvantagesConfig(scale=scale, buffer_size=4, min_count=2)
    skipping, expected = build_advantages(kind, config), build_advantages(kind, config)
    for rewards in (REWARDS, REWARDS.flip(0), REWARDS * 2):  # the buffers of earlier calls are the same, too
        found = skipping(rewards, PROMPTS)
        assert torch.equal(found.isnan(), rewards.isnan())
        assert torch.equal(found[~rewards.isnan()], expected(*without(rewards, PROMPTS)))
    assert json.dumps(skipping.state_dict()) == json.dumps(expected.state_dict())
    assert skipping.metrics() == expected.metrics()


@pytest.mark.parametrize("kind", ["group", "leave_one_out"])
def test_a_group_of_which_one_image_is_left_teaches_nothing(kind: str):
    advantages = build_advantages(kind, AdvantagesConfig())
    found = advantages(torch.tensor([1.0, math.nan, 2.0, math.nan]), [CAT, CAT, DOG, DOG])
    assert found[[0, 2]].tolist() == [0.0, 0.0]


def test_leave_one_out_compares_with_the_others_that_have_a_score():
    advantages = build_advantages("leave_one_out", AdvantagesConfig(scale="none"))
    found = advantages(torch.tensor([1.0, math.nan, 4.0, 7.0]), [CAT] * 4)
    assert found[[0, 2, 3]].tolist() == pytest.approx([1 - 5.5, 0, 7 - 2.5])


@pytest.mark.parametrize("kind", KINDS)
def test_without_any_score_there_is_no_advantage_and_no_memory_of_it(kind: str):
    advantages = build_advantages(kind, AdvantagesConfig(buffer_size=2, min_count=2))
    assert advantages(torch.full((4,), math.nan), [CAT, CAT, DOG, DOG]).isnan().all()
    assert not advantages.state_dict().get("buffers")


def test_tasks_leave_out_their_own():
    kinds = {"one": build_advantages("batch", AdvantagesConfig()), "two": build_advantages("group", AdvantagesConfig())}
    prompts = [Prompt("a", "one")] * 3 + [Prompt("b", "two")] * 3
    rewards = torch.tensor([1.0, math.nan, 3.0, 4.0, 8.0, math.nan])
    found = TaskAdvantages(kinds)(rewards, prompts)
    assert torch.equal(found.isnan(), rewards.isnan())
    alone = build_advantages("batch", AdvantagesConfig())(rewards[[0, 2]], prompts[:2])
    assert torch.equal(found[[0, 2]], alone)


def algorithm_of(name: Any, eta: float = 1.0):
    return build_algorithm(AlgorithmConfig(name=name, eta=eta, temperature=0.5), UpdateConfig(clip_range=0.9))


def test_regression_weighs_the_others_as_a_batch_without_it():
    advantages = torch.tensor([1.0, math.nan, -2.0, 0.5])
    weights = algorithm_of("rwr").sample_weights(advantages)
    exponentials = (advantages[[0, 2, 3]] / 0.5).exp()
    torch.testing.assert_close(weights[[0, 2, 3]], 4 * exponentials / exponentials.sum())
    assert weights[1] == 0 and weights.sum().item() == pytest.approx(4)
    assert algorithm_of("rwr").sample_weights(torch.full((2,), math.nan)).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["ppo", "grpo", "dpok", "reinforce"])
def test_the_mean_of_the_loss_is_over_images_with_an_advantage(name: str):
    weights = algorithm_of(name).sample_weights(torch.tensor([1.0, math.nan, -20.0, 0.5]))
    torch.testing.assert_close(weights, torch.tensor([1.0, 0.0, -10.0, 0.5]) * 4 / 3)


def test_a_pair_with_one_image_is_out_as_a_whole():
    rebel = algorithm_of("rebel", eta=0.7)
    weights = rebel.sample_weights(torch.tensor([1.0, -1.0, math.nan, 5.0, 0.5, 2.0]))
    assert weights.isnan().tolist() == [False, False, True, True, False, False]
    change = torch.randn(12, generator=torch.Generator().manual_seed(0))
    signals = rebel.signals(weights.repeat_interleave(2), lambda: change, 2)
    rows = [0, 1, 2, 3, 8, 9, 10, 11]  # two actions of each of four images
    alone = rebel.signals(weights[[0, 1, 4, 5]].repeat_interleave(2), lambda: change[rows], 2)
    assert signals[4:8].tolist() == [0.0] * 4
    torch.testing.assert_close(signals[rows] / 12, alone / 8)  # the loss is a mean over 12 and over 8 transitions
    assert rebel.signals(torch.full((4,), math.nan), lambda: torch.ones(4), 2).tolist() == [0.0] * 4


def step_of(name: str, advantages: Tensor, trajectory: Trajectory, micro_batch_size: int) -> Tensor:
    """The gradient of one update, on a network of 300 weights."""
    network = TinyNetwork()
    engine = engine_of(network, 1, eps=1.0, lr=1.0)
    before = engine.full_weights()
    algorithm = algorithm_of(name)
    updater = Updater(policy_of(engine), algorithm, engine, UpdateConfig(micro_batch_size=micro_batch_size))
    updater.update(trajectory, algorithm.sample_weights(advantages), Turn(0))
    after = engine.full_weights()
    step = torch.cat([(before[key] - after[key]).flatten().double() for key in before])
    return step / (1 - step.abs())  # undoes Adam's first step g / (|g| + 1)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["ppo", "grpo", "dpok", "reinforce", "rwr", "rebel"])
def test_the_gradient_is_that_of_a_batch_without_it(name: str):
    whole = trajectory_of(policy_of(TinyNetwork()), 8)
    advantages = torch.tensor([1.0, -1.0, math.nan, math.nan, 0.5, 2.0, -0.3, -2.0])
    rows = torch.tensor([0, 1, 4, 5, 6, 7])
    fewer = Trajectory(whole.latents[rows], whole.log_probs[rows], whole.conditioning.take(rows))
    found = step_of(name, advantages, whole, 16)
    expected = step_of(name, advantages[rows], fewer, 12)
    assert expected.norm() > 1e-3
    assert (found - expected).norm() / expected.norm() < 1e-5


@pytest.mark.usefixtures("one_process")
def test_the_mean_advantage_is_over_images_that_have_one():
    network = TinyNetwork()
    engine = engine_of(network, 1)
    advantages = torch.tensor([1.0, math.nan, -3.0, 0.5])
    updater = Updater(policy_of(engine), algorithm_of("ppo"), engine, UpdateConfig(micro_batch_size=8))
    weights = updater.algorithm.sample_weights(advantages)
    updated = updater.update(trajectory_of(policy_of(TinyNetwork()), 4), weights, Turn(0))
    assert updated.metrics(advantages)["advantage/abs_mean"] == pytest.approx(4.5 / 3)
    assert updated.metrics(advantages.nan_to_num(0.0))["advantage/abs_mean"] == 4.5 / 4
