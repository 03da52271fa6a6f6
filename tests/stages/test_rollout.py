"""A batch of trajectories with its rewards, on a network of 300 weights."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from plugin_rewards import Brightness
from tiny_policies import TinyBackbone, TinyNetwork, decode, images_of, policy_of, prompts
from torch import Tensor

from rlcm_fast.config import RolloutConfig
from rlcm_fast.faults import Fault
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.policies import SeededNoise
from rlcm_fast.rewards import Skipping
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.stages.rollout import Collector, Rollout
from rlcm_fast.trajectory import Prompt, Trajectory

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
    assert isinstance(batch.trajectory, Trajectory)
    assert batch.trajectory.conditioning.index.tolist() == [0, 1, 2, 3, 0, 1]
    transitions = batch.trajectory.transitions(torch.arange(12))
    torch.testing.assert_close(policy_of(TinyNetwork()).log_prob(transitions), transitions.log_prob_old)
    assert not batch.trajectory.latents.requires_grad


def test_prompts_are_encoded_once_and_stopping_is_offered_before_every_micro_batch():
    _, backbone = draw(2)
    assert backbone.log[:7] == ["encode"] + ["stop?", "decode"] * 3
    assert set(backbone.log[7:]) <= {"stop?"}, "while it waits for rewards"


def test_images_of_a_prompt_may_share_their_first_state_and_only_that():
    drawn = [draw(4, shared_noise=is_shared)[0].trajectory for is_shared in (True, False)]
    shared, apart = (trajectory.latents for trajectory in drawn if isinstance(trajectory, Trajectory))
    assert torch.equal(shared[0, 0], shared[4, 0])  # a, b, c, d, a, b
    assert torch.equal(shared[1, 0], shared[5, 0]) and not torch.equal(shared[0, 0], shared[1, 0])
    assert not torch.equal(shared[0, 1], shared[4, 1])
    assert not torch.equal(apart[0, 0], apart[4, 0])


def test_noise_does_not_depend_on_the_micro_batch():
    trajectories = [draw(size)[0].trajectory for size in (NUM_SAMPLES, 2)]
    whole, cut = (each.latents for each in trajectories if isinstance(each, Trajectory))
    assert torch.equal(whole[:, 0], cut[:, 0])
    torch.testing.assert_close(whole, cut, rtol=0, atol=1e-5)  # the network's last bits depend on its batch
    other_turn = torch.randint(2**63 - 1, (NUM_SAMPLES, 3), generator=Turn(1).generator(Stream.ROLLOUT))
    assert not torch.equal(SeededNoise(other_turn).first_states(1.0, whole[:, 0].shape), whole[:, 0])


class Small(TinyNetwork):
    """Has memory for so many rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def forward(self, x_t: Tensor, *inputs: Any, **more: Any) -> tuple[Tensor]:
        if len(x_t) > self.most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return super().forward(x_t, *inputs, **more)


def test_a_micro_batch_that_is_out_of_memory_is_drawn_again_with_fewer_images():
    config, said = RolloutConfig(micro_batch_size=4), []
    service = TaskRewards({"one": {"letter": (Letter(), 1.0)}}, config, lambda prompt: "one")
    images = images_of(policy_of(Small(2)))
    try:
        collector = Collector(images, service, config, may_lower=True, say=said.append)
        batch = collector.rollout(prompts(NUM_SAMPLES), Turn(0))
        again = collector.rollout(prompts(NUM_SAMPLES), Turn(0))
        images.policy.unet.most = 0  # type: ignore[attr-defined]
        with pytest.raises(torch.OutOfMemoryError):
            collector.rollout(prompts(NUM_SAMPLES), Turn(0))
        with pytest.raises(torch.OutOfMemoryError):
            Collector(images, service, config, say=said.append).rollout(prompts(NUM_SAMPLES), Turn(0))
    finally:
        service.shutdown()
    given, _ = draw(2)
    for rollout in (batch, again):
        assert isinstance(rollout.trajectory, Trajectory) and isinstance(given.trajectory, Trajectory)
        assert torch.equal(rollout.trajectory.latents, given.trajectory.latents)
        assert rollout.rewards["one"].by_name["letter"].tolist() == [0, 1, 2, 3, 0, 1]
    assert len(said) == 2  # 4 to 2, and 2 to 1 before it ends
    assert said[0].startswith("a rollout's micro-batch of 4 images is out of memory; going on with 2 at once")


def test_seeded_noise_is_standard_normal_in_the_first_state_and_in_each_action():
    noise = SeededNoise.draw(64, 2, torch.Generator().manual_seed(0), torch.device("cpu"))
    shape = (64, 4, 16, 16)  # 65,536 numbers
    zeros, coef = torch.zeros(shape), torch.tensor([0.0, 0.0, 1.0]).expand(64, 3)
    drawn = [noise.first_states(1.0, shape), *(noise.act(k, zeros, zeros, coef)[0] for k in (0, 1))]
    for numbers in drawn:
        assert abs(numbers.mean().item()) < 4 / 256 and numbers.std().item() == pytest.approx(1, abs=4 / 362)
    pairs = torch.stack([numbers.flatten() for numbers in drawn])
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 4 / 256
    torch.testing.assert_close(noise.first_states(0.5, shape), 0.5 * drawn[0])


class Failing(Brightness):
    """Cannot score images of the given prompts."""

    def __init__(self, texts: str) -> None:
        self.texts = texts

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if any(prompt.text in self.texts for prompt in prompts):
            raise ConnectionError("no answer")
        return super().__call__(images, prompts)


def draw_failing(texts: str, max_skipped: float) -> Rollout:
    rewards = {"one": {"judge": (Failing(texts), 1.0), "letter": (Letter(), 0.5)}}
    config = RolloutConfig(micro_batch_size=4, max_skipped=max_skipped)
    skipping = {"one": Skipping(frozenset(["judge"]), 1.0, NUM_SAMPLES)}
    service = TaskRewards(rewards, config, lambda prompt: "one", skipping)
    try:
        return Collector(images_of(policy_of(TinyNetwork())), service, config).rollout(prompts(NUM_SAMPLES), Turn(3))
    finally:
        service.shutdown()


def test_an_image_without_a_score_is_counted_and_said_and_not_in_the_means(capsys: pytest.CaptureFixture[str]):
    batch = draw_failing("c", 0.5)
    assert batch.total.isnan().tolist() == [False, False, True, False, False, False]  # a, b, c, d, a, b
    metrics = batch.metrics(has_tasks=False)
    assert metrics["skipped_images"] == 1
    letters = torch.tensor([0.0, 1, 3, 0, 1]).double()
    assert metrics["reward/letter/mean"] == pytest.approx(torch.tensor([0.0, 1, 2, 3, 0, 1]).mean().item())
    known = batch.rewards["one"].by_name["judge"][[0, 1, 3, 4, 5]].double()
    assert metrics["reward/judge/mean"] == known.mean().item()
    assert metrics["reward/total/std"] == pytest.approx((known + 0.5 * letters).std(correction=0).item(), abs=1e-6)
    said = "iteration 3 skipped 1 of 6 images: reward 'judge', prompt 'c': ConnectionError: no answer\n"
    assert capsys.readouterr().err == said


def test_too_many_images_without_a_score_stop_the_run_on_all_processes():
    message = r"^iteration 3: 2 of 6 images have no score, the last with reward 'judge', prompt 'a': ConnectionError"
    with pytest.raises(Fault, match=message) as raised:
        draw_failing("a", 0.2)
    assert raised.value.is_on_all_processes


def test_without_a_reward_that_may_fail_nothing_is_counted():
    batch, _ = draw(4)
    assert "skipped_images" not in batch.metrics(has_tasks=False)


def test_a_stop_does_not_wait_for_a_reward():
    gate, is_called = threading.Event(), threading.Event()

    class Stopped(Exception):
        pass

    def stuck(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        is_called.set()
        gate.wait(60)
        return images.mean(dim=(1, 2, 3))

    def may_stop() -> None:
        if is_called.is_set():
            raise Stopped

    config = RolloutConfig(micro_batch_size=NUM_SAMPLES, reward_workers=1)
    service = TaskRewards({"one": {"stuck": (stuck, 1.0)}}, config, lambda prompt: "one")  # type: ignore[dict-item]
    with pytest.raises(Stopped):
        Collector(images_of(policy_of(TinyNetwork())), service, config).rollout(prompts(NUM_SAMPLES), Turn(0), may_stop)
    gate.set()
    service.shutdown()
