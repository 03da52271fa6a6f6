"""A batch of trajectories with its rewards, on a network of 300 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from plugin_rewards import Brightness
from tiny_policies import TinyNetwork, decode, encode, policy_of, prompts
from torch import Tensor

from rlcm_fast.config import RolloutConfig
from rlcm_fast.stages.rollout import Rollout, rollout
from rlcm_fast.tasks import TaskRewards
from rlcm_fast.trajectory import Conditioning, Prompt

NUM_SAMPLES = 6


class Letter:
    """Scores the prompt alone: 0 for a, 1 for b, ..."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return torch.tensor([float(ord(prompt.text) - ord("a")) for prompt in prompts])


def draw(
    micro_batch_size: int, log: list[str] | None = None, shared_noise: bool = False
) -> tuple[Rollout, list[Tensor]]:
    """A rollout, and its x_0 in micro-batches; log: "encode", "stop?" and "decode" in the order of the calls."""
    log = [] if log is None else log
    decoded: list[Tensor] = []

    def logged_encode(prompts: Sequence[Prompt]) -> Conditioning:
        log.append("encode")
        return encode(prompts)

    def logged_decode(x_0: Tensor) -> Tensor:
        log.append("decode")
        decoded.append(x_0)
        return decode(x_0)

    rewards = {"brightness": (Brightness(), 1.0), "letter": (Letter(), 0.5)}
    service = TaskRewards({"one": rewards}, 2, lambda prompt: "one")
    generator = torch.Generator().manual_seed(0)
    stop = lambda: log.append("stop?")  # noqa: E731
    try:
        config = RolloutConfig(micro_batch_size=micro_batch_size, shared_noise=shared_noise)
        arguments = (prompts(NUM_SAMPLES), logged_encode, logged_decode, service, generator, config, 0, stop)
        return rollout(policy_of(TinyNetwork()), *arguments), decoded
    finally:
        service.shutdown()


def test_rewards_are_those_of_the_samples_in_their_order():
    batch, decoded = draw(micro_batch_size=4)
    images, rewards = decode(torch.cat(decoded)), batch.rewards["one"].by_name
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
    log: list[str] = []
    draw(2, log)
    assert log == ["encode"] + ["stop?", "decode"] * 3


def test_images_of_a_prompt_may_share_their_first_state_and_only_that():
    shared, apart = (draw(4, shared_noise=is_shared)[0].trajectory.latents for is_shared in (True, False))
    assert torch.equal(shared[0, 0], shared[4, 0])  # a, b, c, d, a, b
    assert torch.equal(shared[1, 0], shared[5, 0]) and not torch.equal(shared[0, 0], shared[1, 0])
    assert not torch.equal(shared[0, 1], shared[4, 1])
    assert not torch.equal(apart[0, 0], apart[4, 0])
