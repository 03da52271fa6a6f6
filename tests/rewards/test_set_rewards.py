"""Rewards of groups of images: who is in a group, what its members get, and what goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from rlcm_fast.rewards import GroupReward, RewardError, RewardService, SetReward, Workers, build_reward, evaluate
from rlcm_fast.rewards.parity import DistributionParity
from rlcm_fast.trajectory import Prompt

Credit = Literal["group", "leave_one_out"]


class Spread:
    """Something that is not linear in its images: the product of their mean and their variance."""

    scope = "set"

    def __init__(self) -> None:
        self.num_described = 0

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.num_described += len(images)
        return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1)

    def value(self, described: Tensor) -> Tensor:
        return described.mean(dim=1)[:, 0] * described.var(dim=1, correction=0).sum(dim=1)


def images_of(num_images: int) -> Tensor:
    return torch.rand(num_images, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def prompts_of(texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def grouped(group_size: int = 0, credit: Credit = "group", reward: SetReward | None = None) -> GroupReward:
    return GroupReward("spread", reward or Spread(), group_size, credit)


def gather(reward: GroupReward, images: Tensor, prompts: Sequence[Prompt], cuts: Sequence[int] = (), weight=1.0):
    workers = Workers(2)
    service = RewardService({"spread": (reward, weight)}, workers)
    try:
        for first, last in zip([0, *cuts], [*cuts, len(images)], strict=True):
            service.submit(images[first:last], prompts[first:last])
        return service.gather(iteration=3)
    finally:
        workers.shutdown()


def brute_force(images: Tensor, groups: Sequence[Sequence[int]], credit: Credit) -> Tensor:
    """One call a set of images: the definition."""
    spread = Spread()

    def value(rows: Sequence[int]) -> Tensor:
        return spread.value(spread.describe(images[list(rows)], [])[None])[0]

    scores = torch.empty(len(images))
    for rows in groups:
        for row in rows:
            others = [other for other in rows if other != row]
            scores[row] = value(rows) - (value(others) if credit == "leave_one_out" else 0)
    return scores


@pytest.mark.parametrize("credit", ["group", "leave_one_out"])
@pytest.mark.parametrize(
    ("group_size", "groups"), [(2, [[0, 1], [2, 3], [4, 5], [6, 7]]), (4, [range(4), range(4, 8)]), (0, [range(8)])]
)
def test_members_get_the_credit_of_their_own_group_whatever_the_labels_of_their_prompts(
    credit: Credit, group_size: int, groups: list[Sequence[int]]
):
    images, prompts = images_of(8), [Prompt(text, label) for text, label in zip("aabbccdd", "ststtsss", strict=True)]
    rewards = gather(grouped(group_size, credit), images, prompts, weight=3.0)
    torch.testing.assert_close(rewards.by_name["spread"], brute_force(images, groups, credit), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(rewards.values["spread"], brute_force(images, groups, "group"), rtol=1e-5, atol=1e-7)
    assert torch.equal(rewards.total, 3 * rewards.by_name["spread"])


@pytest.mark.parametrize("credit", ["group", "leave_one_out"])
def test_micro_batches_may_cut_a_group_and_no_image_is_described_twice(credit: Credit):
    images, prompts = images_of(8), prompts_of("aaaabbbb")
    whole = gather(grouped(4, credit), images, prompts)
    spread = Spread()
    cut = gather(grouped(4, credit, spread), images, prompts, cuts=[1, 3, 6])
    assert torch.equal(cut.total, whole.total)
    assert torch.equal(cut.values["spread"], whole.values["spread"])
    assert spread.num_described == 8


def test_called_as_an_image_reward_it_takes_the_images_for_all():
    images, prompts = images_of(4), prompts_of("aabb")
    reward = grouped(2, "leave_one_out")
    assert torch.equal(reward(images, prompts), gather(reward, images, prompts).by_name["spread"])


def test_an_evaluation_has_a_value_a_group_and_puts_the_repeats_of_a_prompt_side_by_side():
    images, prompts = images_of(4), prompts_of("abab")
    described = Spread().describe(images, prompts)
    values = evaluate("spread", grouped(2, "leave_one_out"), described, prompts, iteration=0)
    torch.testing.assert_close(values, brute_force(images, [[0, 2], [1, 3]], "group")[:2], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("group_size", "credit", "texts", "message"),
    [
        (3, "group", "abcd", "name=spread group_size=3 does not divide the 4 images; give a size that does, or 0"),
        (1, "leave_one_out", "abcd", "credit=leave_one_out leaves nothing of a group of one image; give groups"),
        (0, "leave_one_out", "a", "credit=leave_one_out leaves nothing of a group of one image"),
    ],
)
def test_images_that_do_not_make_groups_are_refused(group_size: int, credit: Credit, texts: str, message: str):
    with pytest.raises(ValueError, match=message):
        gather(grouped(group_size, credit), images_of(len(texts)), prompts_of(texts))


class Wrong(Spread):
    """Returns what it was given from describe and value, or raises it."""

    def __init__(self, description: Any = None, value: Any = None) -> None:
        super().__init__()
        self.description, self.returned = description, value

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if isinstance(self.description, Exception):
            raise self.description
        return super().describe(images, prompts) if self.description is None else self.description

    def value(self, described: Tensor) -> Tensor:
        if isinstance(self.returned, Exception):
            raise self.returned
        return self.returned


@pytest.mark.parametrize(
    ("reward", "prompt", "problem"),
    [
        (Wrong(torch.zeros(4)), "a", r"describe\(\) returned torch.float32 of shape \(4,\); return .* \(4, F\)"),
        (Wrong(torch.zeros(4, 0)), "a", r"describe\(\) returned torch.float32 of shape \(4, 0\)"),
        (Wrong(torch.zeros(4, 2).double()), "a", r"describe\(\) returned torch.float64"),
        (Wrong("votes"), "a", r"describe\(\) returned str; return a float32 tensor of shape \(4, F\)"),
        (Wrong(torch.tensor([[0.0], [0.0], [torch.inf], [0.0]])), "c", "a number that is not finite for image 2"),
        (Wrong(OSError("gone")), "a", "raised OSError: gone"),
        (Wrong(value=torch.zeros(2, 1)), "a", r"value\(\) returned .* \(2, 1\); return .*\(2,\), one value per group"),
        (Wrong(value=torch.zeros(2).double()), "a", r"value\(\) returned torch.float64"),
        (Wrong(value=torch.tensor([0.0, torch.nan])), "c", r"value\(\) returned nan for group 1 of 2 images; values"),
        (Wrong(value=KeyError("k")), "a", "raised KeyError: 'k'"),
    ],
)
def test_a_wrong_description_or_value_names_reward_prompt_and_iteration(reward: Wrong, prompt: str, problem: str):
    with pytest.raises(RewardError, match=rf"reward 'spread', prompt '{prompt}', iteration 3: .*{problem}"):
        gather(grouped(2, reward=reward), images_of(4), prompts_of("abcd"))


def test_descriptions_of_other_widths_in_other_micro_batches_are_refused():
    class Widening(Spread):
        def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
            return torch.zeros(len(images), len(images))

    with pytest.raises(RewardError, match=r"prompt 'b', iteration 3: describe\(\) returned 3 numbers .* and 1 before"):
        gather(grouped(reward=Widening()), images_of(4), prompts_of("abcd"), cuts=[1])


def _gradients(credit: Credit, logits: Tensor, num_images: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of a policy that draws a class for each image, over all outcomes: the expected gradient estimate, its total
    variance, and the gradient of the expected value of a group.
    """
    parity = DistributionParity("plugin_rewards:Quadrants", target=[0.5, 0.3, 0.2])  # never called: votes are made here
    reward = GroupReward("parity", parity, credit=credit)
    outcomes = torch.tensor(list(product(range(3), repeat=num_images)))  # (O, k)
    one_hot = torch.nn.functional.one_hot(outcomes, 3).float()
    groups = reward.groups(num_images)
    credits = torch.stack([reward.values_and_credits(votes, groups)[1] for votes in one_hot]).double()  # (O, k)
    policy = logits.clone().requires_grad_()
    chances = policy.log_softmax(dim=0)[outcomes].sum(dim=1).exp()  # (O,)
    (exact,) = torch.autograd.grad((chances * parity.value(one_hot)).sum(), policy)
    scores = one_hot - logits.softmax(dim=0)  # (O, k, 3), the gradient of each image's log-prob
    estimates = (credits[:, :, None] * scores).sum(dim=1)
    mean = (chances.detach()[:, None] * estimates).sum(dim=0)
    variance = (chances.detach()[:, None] * (estimates - mean).square()).sum()
    return mean, variance, exact


@pytest.mark.parametrize(
    ("logits", "num_images", "variance_ratio"),
    [
        ([0.7, -0.4, 0.1], 3, 0.28),
        ([0.7, -0.4, 0.1], 6, 0.18),
        ([2.0, -1.0, -1.0], 3, 1.38),  # nine in ten images alike, few in a group: not less noise in every case
        ([2.0, -1.0, -1.0], 6, 0.49),
    ],
)
def test_both_credits_have_the_same_expected_policy_gradient_and_leave_one_out_mostly_less_noise(
    logits: list[float], num_images: int, variance_ratio: float
):
    start = torch.tensor(logits, dtype=torch.float64)
    paper, noise, exact = _gradients("group", start, num_images)
    leave_one_out, less_noise, _ = _gradients("leave_one_out", start, num_images)
    assert exact.abs().max() > 0.01
    torch.testing.assert_close(paper, exact, rtol=0, atol=1e-6)
    torch.testing.assert_close(leave_one_out, exact, rtol=0, atol=1e-6)
    assert (less_noise / noise).item() == pytest.approx(variance_ratio, abs=0.005)


def test_leave_one_out_of_a_mean_is_the_score_above_the_others_mean_over_the_group_size():
    class Mean(Spread):
        def value(self, described: Tensor) -> Tensor:
            return described[:, :, 0].mean(dim=1)

    images = images_of(4)
    credits = grouped(0, "leave_one_out", Mean())(images, prompts_of("aabb"))
    scores = images.mean(dim=(1, 2, 3))
    others = (scores.sum() - scores) / 3
    torch.testing.assert_close(credits, (scores - others) / 4, rtol=0, atol=1e-6)


def test_a_set_reward_is_built_with_its_groups():
    reward = build_reward(f"{__name__}:Spread", {}, group_size=4, credit="leave_one_out")
    assert isinstance(reward, GroupReward)
    assert (reward.group_size, reward.credit, reward.scope) == (4, "leave_one_out", "set")


@pytest.mark.parametrize(
    ("group_size", "credit", "given"), [(2, "group", "group_size=2"), (0, "leave_one_out", "cred")]
)
def test_groups_of_an_image_reward_are_refused(group_size: int, credit: Credit, given: str):
    with pytest.raises(ValueError, match=f"rewards: name=jpeg_compressibility {given}.* scores each image on its own"):
        build_reward("jpeg_compressibility", {}, group_size, credit)
