"""A batch of trajectories with its rewards, on a network of 300 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plugin_rewards import Brightness
from tiny_policies import TinyBackbone, TinyNetwork, decode, images_of, policy_of, prompts
from torch import Tensor

from rlcm_fast.config import RolloutConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.rollout import Collector, Rollout
from rlcm_fast.tasks import TaskRewards
from rlcm_fast.trajectory import Prompt

NUM_SAMPLES = 6


class Letter:
    """Scores the prompt alone: 0 for a, 1 for b, ..."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([float(ord(prompt.text) - ord("a")) for prompt in prompts])


def draw(micro_batch_size: int, shared_noise: bool = False) -> tuple[Rollout, TinyBackbone]:
    """A rollout, and the backbone that noted "encode", "stop?" and "decode" in the order of the calls."""
    backbone = TinyBackbone()
    rewards = {"brightness": (Brightness(), 1.0), "letter": (Letter(), 0.5)}
    config = RolloutConfig(micro_batch_size=micro_batch_size, shared_noise=shared_noise)
    service = TaskRewards({"one": rewards}, config, lambda prompt: "one")
    try:
        collector = Collector(images_of(policy_of(TinyNetwork()), backbone), service, config)
        return collector.rollout(prompts(NUM_SAMPLES), Turn(0), lambda: backbone.log.append("stop?")), backbone
    finally:
        service.shutdown()


def test_rewards_are_those_of_the_samples_in_their_order():
    batch, backbone = draw(micro_batch_size=4)
    images, rewards = decode(torch.cat(backbone.decoded)), batch.rewards["one"].by_name
    torch.testing.assert_close(rewards["brightness"], Brightness()(images, []), rtol=0, atol=0)
    assert rewards["letter"].tolist() == [0, 1, 2, 3, 0, 1]
    weighted = rewards["brightness"] + 0.5 * rewards["letter"]
    torch.testing.assert_close(batch.total, weighted)
    assert batch.seconds >= batch.wait_seconds >= 0


def test_micro_batches_become_one_trajectory_with_the_prompts_in_order():
    batch, _ = draw(micro_batch_size=4)
    assert (batch.trajectory.num_samples, batch.trajectory.num_actions) == (NUM_SAMPLES, 2)
    assert batch.trajectory.conditioning.index.tolist() == [0, 1, 2, 3, 0, 1]
    transitions = batch.trajectory.transitions(torch.arange(12))
    torch.testing.assert_close(policy_of(TinyNetwork()).log_prob(transitions), transitions.log_prob_old)
    assert not batch.trajectory.latents.requires_grad


def test_prompts_are_encoded_once_and_stopping_is_offered_before_every_micro_batch():
    _, backbone = draw(2)
    assert backbone.log[:7] == ["encode"] + ["stop?", "decode"] * 3
    assert set(backbone.log[7:]) <= {"stop?"}, "while it waits for rewards"


def test_images_of_a_prompt_may_share_their_first_state_and_only_that():
    shared, apart = (draw(4, shared_noise=is_shared)[0].trajectory.latents for is_shared in (True, False))
    assert torch.equal(shared[0, 0], shared[4, 0])  # a, b, c, d, a, b
    assert torch.equal(shared[1, 0], shared[5, 0]) and not torch.equal(shared[0, 0], shared[1, 0])
    assert not torch.equal(shared[0, 1], shared[4, 1])
    assert not torch.equal(apart[0, 0], apart[4, 0])
