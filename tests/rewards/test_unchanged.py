"""A reward that changes its images is found and named, whatever the way, and its neighbours are not."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.rewards import Reward, RewardError, RewardService, Skipping, Workers
from rlcm_fast.rewards.batcher import Batcher
from rlcm_fast.rewards.outcomes import Failed
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt("a cat"), Prompt("a dog")]


def in_torch(images: Tensor) -> None:
    images.mul_(0.5)


def in_a_view(images: Tensor) -> None:
    images[0].flatten(1)[:, :2] = 0


def in_numpy(images: Tensor) -> None:
    images.numpy()[1, 0, 0, 0] += 0.25


def by_flipping_in_numpy(images: Tensor) -> None:
    pixels = images.numpy()
    pixels[:] = pixels[..., ::-1].copy()  # the sum of all pixels stays


def not_at_all(images: Tensor) -> None:
    Image.fromarray((images[0].permute(1, 2, 0).numpy() * 255).astype(np.uint8)).putpixel((0, 0), 0)
    images.clone().zero_()
    images.numpy().copy()[:] = 0


class Mean:
    """Waits, then scores by the mean; may change the images before or after."""

    scope = "image"

    def __init__(self, change, seconds: float = 0.0) -> None:
        self._change, self._seconds = change, seconds

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        time.sleep(self._seconds)
        scores = images.flatten(1).mean(dim=1)
        self._change(images)
        return scores


class Set(Mean):
    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self(images, prompts)[:, None]

    def value(self, described: Tensor) -> Tensor:
        return described.mean(dim=(1, 2))


def pictures() -> Tensor:
    return torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def gathered(rewards: dict[str, Reward], num_workers: int, skipping: Skipping | None = None):
    workers = Workers(num_workers)
    service = RewardService({name: (reward, 1.0) for name, reward in rewards.items()}, workers, skipping)
    try:
        service.submit(pictures(), PROMPTS)
        return service.gather(iteration=3)
    finally:
        workers.shutdown()


CHANGES = [in_torch, in_a_view, in_numpy, by_flipping_in_numpy]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("seconds", [(0.0, 0.0, 0.0), (0.05, 0.0, 0.05), (0.0, 0.05, 0.0)])
def test_the_reward_that_changes_the_images_is_named_and_no_other(change, num_workers: int, seconds):
    rewards = {"first": Mean(not_at_all, seconds[0]), "guilty": Mean(change, seconds[1])}
    rewards["last"] = Mean(not_at_all, seconds[2])
    with pytest.raises(RewardError) as error:
        gathered(rewards, num_workers)
    assert str(error.value).startswith("reward 'guilty', prompt 'a cat', iteration 3: changed its images in place")
    assert "images.clone()" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_rewards_that_leave_the_images_alone_are_not_blamed(num_workers: int):
    scores = gathered({"one": Mean(not_at_all), "two": Mean(not_at_all)}, num_workers)
    assert torch.equal(scores.by_name["one"], scores.by_name["two"])


def test_a_set_reward_and_one_that_may_fail_are_watched_too():
    from rlcm_fast.rewards import grouped

    with pytest.raises(RewardError, match="'set'.*changed its images in place"):
        gathered({"set": grouped("set", Set(in_torch), 2, "group")}, 1)

    def change_and_fail(images: Tensor) -> None:
        in_torch(images)
        raise OSError

    with pytest.raises(RewardError, match="'it'.*changed its images in place"):
        gathered({"it": Mean(change_and_fail)}, 1, Skipping(frozenset({"it"}), 1.0, 2))


def test_inference_tensors_have_no_version_but_bytes():
    workers = Workers(1)
    with torch.inference_mode():
        images = pictures()
    try:
        service = RewardService({"it": (Mean(in_numpy), 1.0)}, workers)
        service.submit(images, PROMPTS)
        with pytest.raises(RewardError, match="changed its images in place"):
            service.gather(iteration=0)
    finally:
        workers.shutdown()


def test_a_server_says_it_to_its_client():
    batcher = Batcher(Mean(in_torch), torch.device("cpu"), batch_size=2, most_waiting=8)
    try:
        outcomes = [future.result(10) for future in batcher.submit([np.zeros((8, 8, 3), np.uint8) + 9] * 2, PROMPTS)]
    finally:
        batcher.close()
    assert all(isinstance(outcome, Failed) and "changed its images in place" in outcome.problem for outcome in outcomes)
