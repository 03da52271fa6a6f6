"""Rewards that fail for single images: who is skipped, who goes on, and when it is too much."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from rlcm_fast.faults import Diverged, Fault
from rlcm_fast.rewards import GroupReward, ImagesFailed, RewardError, RewardService, Skipping, Workers, evaluate
from rlcm_fast.trajectory import Prompt


class Judge:
    """The mean of an image; cannot answer for prompts with an x, and notes its calls."""

    scope = "image"

    def __init__(self, names_images: bool = False, error: type[Exception] = ConnectionError) -> None:
        self.names_images, self.error = names_images, error
        self.calls: list[str] = []

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        texts = [prompt.text for prompt in prompts]
        self.calls.append("".join(texts))
        scores = images.mean(dim=(1, 2, 3))
        failed = {index: f"no answer\nfor {text}" for index, text in enumerate(texts) if "x" in text}
        if failed and self.names_images:
            raise ImagesFailed(scores, failed)
        if failed:
            raise self.error("no answer")
        return scores


class JudgeOfSets(Judge):
    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self(images, prompts)[:, None]

    def value(self, described: Tensor) -> Tensor:
        return described.square().mean(dim=(1, 2))


def images_of(num_images: int) -> Tensor:
    return torch.rand(num_images, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def prompts_of(texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


@contextmanager
def serving(rewards: dict[str, Any], skips: str = "judge", share: float = 1.0, num_images: int = 8):
    workers = Workers(2)
    skipping = Skipping(frozenset([skips]), share, num_images)
    try:
        yield RewardService({name: (reward, 2.0) for name, reward in rewards.items()}, workers, skipping)
    finally:
        workers.shutdown()


def gather(rewards: dict[str, Any], texts: str, size: int = 4, **settings: Any):
    images = images_of(len(texts))
    with serving(rewards, **settings) as service:
        for first in range(0, len(texts), size):
            service.submit(images[first : first + size], prompts_of(texts[first : first + size]))
        return service.gather(3)


@pytest.mark.parametrize("names_images", [False, True])
def test_an_image_that_a_reward_fails_for_has_no_score_and_the_others_have_theirs(names_images: bool):
    found = gather(
        {"judge": Judge(names_images), "steady": lambda images, prompts: images.mean(dim=(1, 2, 3))}, "abxdefgx"
    )
    means = images_of(8).mean(dim=(1, 2, 3))
    is_missing = torch.tensor([text == "x" for text in "abxdefgx"])
    assert torch.equal(found.by_name["judge"].isnan(), is_missing)
    assert torch.equal(found.by_name["judge"][~is_missing], means[~is_missing])
    assert torch.equal(found.by_name["steady"], means), "another reward keeps its score"
    assert torch.equal(found.total.isnan(), is_missing), "a total is missing if one of its scores is"
    problem = "no answer for x" if names_images else "ConnectionError: no answer"
    assert found.problems == (f"reward 'judge', prompt 'x': {problem}",) * 2


def test_a_call_that_fails_is_repeated_image_by_image_unless_it_names_them():
    judge, naming = Judge(), Judge(names_images=True)
    gather({"judge": judge}, "axc")
    assert judge.calls == ["axc", "a", "x", "c"]
    gather({"judge": naming}, "axc")
    assert naming.calls == ["axc"]


def test_a_failure_that_does_not_come_again_costs_no_image():
    class Recovering(Judge):
        def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            self.calls.append("")
            if len(self.calls) == 1:
                raise TimeoutError("busy")
            return images.mean(dim=(1, 2, 3))

    found = gather({"judge": Recovering()}, "ab")
    assert torch.equal(found.total, 2 * images_of(2).mean(dim=(1, 2, 3)))
    assert found.problems == ()


def test_a_micro_batch_of_which_all_fail_has_no_scores():
    for names_images in (False, True):
        found = gather({"judge": Judge(names_images)}, "abxx", size=2)
        assert found.total.isnan().tolist() == [False, False, True, True]


@pytest.mark.parametrize(
    ("names_images", "problem"),
    [
        (False, "prompt 'a', iteration 3: raised ConnectionError: no answer; repair the reward, or let it fail for"),
        (True, "prompt 'x', iteration 3: failed for image 1: no answer for x; repair the reward, or let it fail for"),
    ],
)
def test_a_reward_that_may_not_fail_stops_the_run_in_one_line(names_images: bool, problem: str):
    judge = Judge(names_images)
    with pytest.raises(RewardError, match=rf"^reward 'judge', {problem} single images with on_failure: skip$"):
        gather({"judge": judge}, "axc", skips="another")
    assert judge.calls == ["axc"]


@pytest.mark.parametrize("answer", [[1.0], torch.zeros(3), torch.tensor([0.0, math.nan])])
def test_a_mistake_of_the_reward_is_no_failure_of_an_image(answer: Any):
    with pytest.raises(RewardError, match="returned"):
        gather({"judge": lambda images, prompts: answer}, "ab")


@pytest.mark.parametrize(
    ("failed", "problem"),
    [
        (ImagesFailed(torch.zeros(2), {5: "?"}), r"raised ImagesFailed for images \[5\] of 2; give indices"),
        (ImagesFailed(torch.zeros(2), {}), r"raised ImagesFailed for images \[\] of 2; give indices"),
        (ImagesFailed(torch.zeros(1), {0: "?"}), "without a score for each of its 2 images"),
        (ImagesFailed(None, {0: "?"}), "without a score for each of its 2 images"),
        (ImagesFailed(torch.tensor([0.0, math.inf]), {0: "?"}), "returned inf"),
    ],
)
def test_a_failure_that_is_told_wrongly_is_a_mistake(failed: ImagesFailed, problem: str):
    def judge(images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        raise failed

    with pytest.raises(RewardError, match=problem):
        gather({"judge": judge}, "ab")


def test_a_broken_image_is_never_skipped():
    images = images_of(2)
    images[1] = math.nan
    with serving({"judge": Judge()}) as service:
        service.submit(images, prompts_of("ab"))
        with pytest.raises(Diverged, match="prompt 'b', iteration 3: image 1"):
            service.gather(3)


def test_a_reward_that_is_gone_is_not_called_for_every_image():
    judge = Judge()
    with pytest.raises(RewardError, match=r"failed for 3 images, .* rollout.max_skipped allows 2: repair"):
        gather({"judge": judge}, "x" * 8, size=8, share=0.25)
    assert len(judge.calls) == 4  # the micro-batch, and three images


def test_each_gather_counts_its_own_failures():
    with serving({"judge": Judge()}, share=0.25, num_images=4) as service:
        for iteration in range(3):
            service.submit(images_of(4), prompts_of("abxd"))
            assert service.gather(iteration).total.isnan().sum() == 1


@pytest.mark.parametrize(("share", "num_images", "limit"), [(0.01, 64, 1), (0.01, 500, 5), (0.0, 500, 0), (1.0, 8, 8)])
def test_the_bound_is_a_share_and_at_least_one(share: float, num_images: int, limit: int):
    skipping = Skipping(share=share)
    assert skipping.limit(num_images) == limit
    skipping.check(limit, num_images, "iteration 3", [])
    message = f"^iteration 3: {limit + 1} of {num_images} images have no score, the last with reward 'judge'; rollout"
    with pytest.raises(Fault, match=message) as raised:
        skipping.check(limit + 1, num_images, "iteration 3", ["reward 'judge'"])
    assert raised.value.is_on_all_processes


def expected_of_sets(texts: str, size: int, credit: str) -> tuple[list[float], list[float]]:
    """The definition, group by group: values and credits of the images that are described."""
    squares = images_of(len(texts)).mean(dim=(1, 2, 3)).square().tolist()
    values, credits = [math.nan] * len(texts), [math.nan] * len(texts)
    for first in range(0, len(texts), size):
        there = [place for place in range(first, first + size) if texts[place] != "x"]
        for place in there:
            others = [squares[other] for other in there if other != place]
            values[place] = sum(squares[other] for other in there) / len(there)
            if credit == "group":
                credits[place] = values[place]
            elif others:
                credits[place] = values[place] - sum(others) / len(others)
    return values, credits


@pytest.mark.parametrize("credit", ["group", "leave_one_out"])
@pytest.mark.parametrize("cut", [1, 3, 12])
def test_a_group_goes_on_without_its_image_if_it_can(credit: Any, cut: int):
    texts = "abcdexghxxxlxxxx"[:12]  # all; three of four; one of four is left
    reward = GroupReward("judge", JudgeOfSets(), 4, credit)
    found = gather({"judge": reward}, texts, size=cut)
    values, credits = expected_of_sets(texts, 4, credit)
    torch.testing.assert_close(found.values["judge"], torch.tensor(values), equal_nan=True)
    torch.testing.assert_close(found.by_name["judge"], torch.tensor(credits), equal_nan=True)
    assert torch.equal(found.total.isnan(), torch.tensor(credits).isnan())


def test_a_group_without_any_image_has_no_value():
    reward = GroupReward("judge", JudgeOfSets(), 2)
    with serving({"judge": reward}) as service:
        service.submit(images_of(4), prompts_of("aaxx"))
        raw_scores = service.raw_scores(0).by_name["judge"]
    assert evaluate("judge", reward, raw_scores, prompts_of("aabb"), 0).isnan().tolist() == [False, True]
