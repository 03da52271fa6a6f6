"""Held-out images at fixed seeds, on a network of 300 weights; tests/test_processes.py shares them out."""

from __future__ import annotations

import pytest
import torch
from plugin_rewards import Brightness, Faulty
from tiny_policies import TinyNetwork, decode, encode, policy_of, prompts

from rlcm_fast import parallel
from rlcm_fast.evaluation import Evaluator
from rlcm_fast.prompts import deal
from rlcm_fast.rewards import RewardError
from rlcm_fast.shapes.reward import image_diversity

POLICY = policy_of(TinyNetwork())


def evaluator(num_images: int = 5, micro_batch_size: int = 2, seed: int = 9) -> Evaluator:
    rewards = {"brightness": (Brightness(), 3.0)}
    return Evaluator(deal(prompts(2), num_images, seed), seed, micro_batch_size, rewards, encode, decode)


def test_an_evaluation_repeats_exactly_and_depends_on_its_seed():
    first = evaluator()(POLICY, 0)
    torch.randn(7)
    assert evaluator()(POLICY, 5) == first
    assert evaluator(seed=10)(POLICY, 0) != first


def test_its_numbers_are_those_of_the_images_without_reward_weights():
    drawn = [POLICY.sample(encode(batch), parallel.generator(9, i))[1] for i, batch in enumerate(_micro_batches())]
    images = decode(torch.cat(drawn))
    scores = Brightness()(images, []).double()
    metrics = evaluator()(POLICY, 0)
    assert metrics == {
        "eval/brightness/mean": pytest.approx(scores.mean().item()),
        "eval/brightness/std": pytest.approx(scores.std(correction=0).item()),
        "eval/diversity": pytest.approx(image_diversity(images)),
    }


def _micro_batches() -> list:
    five = deal(prompts(2), 5, 9)
    return [five[0:2], five[2:4], five[4:5]]


def test_a_single_image_has_no_diversity():
    assert evaluator(num_images=1)(POLICY, 0)["eval/diversity"] == 0.0


def test_a_reward_that_fails_is_named_with_the_iteration():
    faulty = Evaluator(prompts(2), 1, 2, {"faulty": (Faulty("nan", 0), 1.0)}, encode, decode)
    with pytest.raises(RewardError, match=r"reward 'faulty', prompt 'b', iteration 30: returned nan"):
        faulty(POLICY, 30)
