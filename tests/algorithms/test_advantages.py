from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlcm_fast.algorithms import advantages as advantages_module
from rlcm_fast.algorithms import build_advantages
from rlcm_fast.algorithms.advantages import BatchAdvantages, GroupAdvantages, PromptAdvantages
from rlcm_fast.config import AdvantagesConfig
from rlcm_fast.trajectory import Prompt

CAT, DOG = Prompt("a cat"), Prompt("a dog")
rewards_of = st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=24)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, list[Prompt]]:
    """Rewards with prompts of which at least one comes twice."""
    rewards = draw(rewards_of)
    prompts = draw(st.lists(st.sampled_from([CAT, DOG, Prompt("a fox")]), min_size=len(rewards), max_size=len(rewards)))
    return torch.tensor([rewards[0], *rewards]), [prompts[0], *prompts]


@given(rewards=rewards_of)
@settings(deadline=None)
def test_batch_advantages_have_mean_zero_and_standard_deviation_one(rewards: list[float]):
    values = torch.tensor(rewards)
    advantages = BatchAdvantages()(values, [CAT] * len(rewards)).double()
    var = values.double().var(unbiased=False).item()
    assert advantages.mean().abs() < 1e-5
    assert advantages.std(unbiased=False).item() == pytest.approx(math.sqrt(var / (var + 1e-6)), abs=1e-5)


def test_batch_advantages_follow_their_formula():
    advantages = BatchAdvantages(epsilon=0.75)(torch.tensor([1.0, 2.0, 2.0, 3.0]), [CAT, DOG, CAT, DOG])
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 0.0, 0.0, 1.0]) / math.sqrt(0.5 + 0.75))


@given(batch=batches())
@settings(deadline=None)
def test_group_advantages_sum_to_zero_over_every_prompt(batch: tuple[torch.Tensor, list[Prompt]]):
    rewards, prompts = batch
    prompts[1] = prompts[0]
    advantages = GroupAdvantages()(rewards, prompts)
    for prompt in set(prompts):
        group = advantages[torch.tensor([other == prompt for other in prompts])]
        assert group.double().sum().abs() < 1e-4
        assert len(group) > 1 or group.item() == 0


@given(batch=batches(), shift=st.floats(-50, 50, width=32))
@settings(deadline=None)
def test_group_advantages_do_not_see_how_hard_a_prompt_is(batch: tuple[torch.Tensor, list[Prompt]], shift: float):
    rewards, prompts = batch[0].double(), batch[1]
    harder = rewards + shift * torch.tensor([prompt == CAT for prompt in prompts]).double()
    before, after = GroupAdvantages(epsilon=0.1)(rewards, prompts), GroupAdvantages(epsilon=0.1)(harder, prompts)
    torch.testing.assert_close(before, after, rtol=1e-5, atol=1e-5)


def test_group_advantages_follow_their_formula():
    rewards = torch.tensor([1.0, 3.0, 10.0, 16.0])
    advantages = GroupAdvantages(epsilon=0.0)(rewards, [CAT, CAT, DOG, DOG])
    torch.testing.assert_close(advantages, torch.tensor([-1.0, 1.0, -3.0, 3.0]) / math.sqrt(5.0))


def test_a_group_of_equal_rewards_gets_exactly_zero():
    rewards = torch.tensor([0.1, 0.1, 0.1, 0.3, 0.7])
    assert GroupAdvantages()(rewards, [CAT] * 3 + [DOG] * 2)[:3].tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", ["prompt", "batch", "group"])
def test_equal_rewards_everywhere_teach_nothing(kind: str):
    advantages = build_advantages(kind, AdvantagesConfig(buffer_size=16, min_count=2))
    assert advantages(torch.full((6,), 0.1), [CAT, CAT, DOG, DOG, CAT, CAT]).tolist() == [0.0] * 6


def test_groups_of_one_image_are_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r"prompts.images_per_prompt=1 .*; use at least 2"):
        GroupAdvantages()(torch.tensor([1.0, 2.0]), [CAT, DOG])


def test_prompt_advantages_agree_with_a_hand_computed_example_over_three_calls():
    advantages = PromptAdvantages(buffer_size=3, min_count=3, epsilon=0.0)
    # Two rewards of each prompt, fewer than 3: the batch [0, 2, 4, 6] has mean 3 and variance 5.
    first = advantages(torch.tensor([0.0, 2.0, 4.0, 6.0]), [CAT, CAT, DOG, DOG])
    torch.testing.assert_close(first, torch.tensor([-3.0, -1.0, 1.0, 3.0]) / math.sqrt(5.0))
    # The cat now has [0, 2, 4], mean 2, variance 8/3. The dog does not come.
    second = advantages(torch.tensor([4.0]), [CAT])
    torch.testing.assert_close(second, torch.tensor([2.0]) / math.sqrt(8 / 3))
    # The cat's oldest reward has left: [2, 4, 9], mean 5, variance 26/3. The dog has [4, 6, 5], mean 5, variance 2/3.
    third = advantages(torch.tensor([9.0, 5.0]), [CAT, DOG])
    torch.testing.assert_close(third, torch.tensor([4.0 / math.sqrt(26 / 3), 0.0]))


def test_a_prompt_with_enough_rewards_and_one_without_share_a_batch():
    advantages = PromptAdvantages(buffer_size=4, min_count=2, epsilon=0.0)
    result = advantages(torch.tensor([1.0, 3.0, 5.0]), [CAT, CAT, DOG])
    torch.testing.assert_close(result, torch.tensor([-1.0, 1.0, 2.0 / math.sqrt(8 / 3)]))


def test_a_batch_with_more_images_of_a_prompt_than_the_buffer_keeps_the_last():
    advantages = PromptAdvantages(buffer_size=2, min_count=2, epsilon=0.0)
    result = advantages(torch.tensor([7.0, 1.0, 3.0]), [CAT] * 3)  # the buffer is [1, 3]: mean 2, deviation 1
    assert result.tolist() == [5.0, -1.0, 1.0]


def test_epsilon_is_added_to_the_standard_deviation():
    result = PromptAdvantages(2, 2, epsilon=0.5)(torch.tensor([1.0, 3.0]), [CAT, CAT])
    torch.testing.assert_close(result, torch.tensor([-1.0, 1.0]) / 1.5)


def test_tasks_do_not_share_the_statistics_of_a_prompt():
    advantages = PromptAdvantages(2, 2, epsilon=0.0)
    prompts = [CAT, CAT, Prompt(CAT.text, "other"), Prompt(CAT.text, "other")]
    assert advantages(torch.tensor([0.0, 1.0, 50.0, 70.0]), prompts).tolist() == [-1.0, 1.0, -1.0, 1.0]


@given(calls=st.lists(batches(), min_size=2, max_size=6), data=st.data())
@settings(deadline=None)
def test_resuming_through_json_equals_an_uninterrupted_run(calls: list, data: st.DataObject):
    stop = data.draw(st.integers(0, len(calls)))
    uninterrupted, before, after = (PromptAdvantages(buffer_size=5, min_count=3) for _ in range(3))
    expected = [uninterrupted(*call) for call in calls]
    results = [before(*call) for call in calls[:stop]]
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    results += [after(*call) for call in calls[stop:]]
    assert all(torch.equal(result, wanted) for result, wanted in zip(results, expected, strict=True))
    assert after.state_dict() == uninterrupted.state_dict()


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_kinds_without_memory_have_an_empty_state(kind: str):
    advantages = build_advantages(kind, AdvantagesConfig(buffer_size=16, min_count=16))
    assert advantages.state_dict() == {}
    advantages.load_state_dict({})


def test_a_run_that_goes_on_with_statistics_of_prompts_collects_them_anew():
    rewards, prompts = torch.tensor([1.0, 2.0, 4.0]), [CAT, CAT, CAT]
    advantages = PromptAdvantages(buffer_size=2, min_count=2)
    advantages.load_state_dict(BatchAdvantages().state_dict())
    assert torch.equal(advantages(rewards, prompts), PromptAdvantages(2, 2)(rewards, prompts))


@pytest.mark.parametrize("kind", ["prompt", "batch", "group"])
@given(batch=batches())
@settings(deadline=None)
def test_the_result_is_float32_finite_and_leaves_the_rewards_alone(kind: str, batch: tuple[torch.Tensor, list[Prompt]]):
    rewards, prompts = batch
    prompts[1] = prompts[0]
    copy = rewards.clone()
    advantages = build_advantages(kind, AdvantagesConfig(buffer_size=4, min_count=2))(rewards, prompts)
    assert advantages.dtype == torch.float32 and advantages.shape == rewards.shape
    assert advantages.isfinite().all() and torch.equal(rewards, copy)


@pytest.mark.parametrize(("buffer_size", "min_count"), [(16, 32), (16, 0), (0, 0)])
def test_a_buffer_that_never_fills_is_refused_with_the_remedy(buffer_size: int, min_count: int):
    with pytest.raises(ValueError, match=f"advantages.min_count={min_count} must lie between 1 and .*={buffer_size}"):
        build_advantages("prompt", AdvantagesConfig(buffer_size=buffer_size, min_count=min_count))


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"advantages.kind=task is unknown; use prompt, batch, group or leave_one_out"):
        build_advantages("task", AdvantagesConfig())


@pytest.mark.parametrize("kind", ["prompt", "batch", "group"])
def test_rewards_and_prompts_must_be_equally_many(kind: str):
    with pytest.raises(ValueError, match=r"rewards of shape \(3,\) for 2 prompts"):
        build_advantages(kind, AdvantagesConfig())(torch.zeros(3), [CAT, DOG])


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 2.0, 6.0, 10.0, 30.0])
    prompts = [CAT, CAT, CAT, DOG, DOG]
    advantages = GroupAdvantages("none", leaves_one_out=True)(rewards, prompts)
    assert advantages.tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, -20, 20])


def test_scales_of_group_advantages():
    rewards, prompts = torch.tensor([0.0, 2.0, 0.0, 20.0]), [CAT, CAT, DOG, DOG]
    by_scale = {scale: GroupAdvantages(scale, epsilon=0.0)(rewards, prompts) for scale in ("batch", "group", "none")}
    assert by_scale["none"].tolist() == [-1.0, 1.0, -10.0, 10.0]
    assert by_scale["group"].tolist() == [-1.0, 1.0, -1.0, 1.0]
    assert by_scale["batch"].tolist() == pytest.approx([x / math.sqrt(50.5) for x in (-1, 1, -10, 10)])


@pytest.mark.parametrize("scale", ["batch", "group", "none"])
def test_groups_without_variance_are_counted_and_have_no_advantage(scale: str):
    advantages = GroupAdvantages(scale)
    found = advantages(torch.tensor([3.0, 3.0, 3.0, 1.0, 2.0]), [CAT, CAT, CAT, DOG, DOG])
    assert found[:3].tolist() == [0.0, 0.0, 0.0] and found[3:].abs().min() > 0.1
    assert advantages.metrics() == {"zero_variance_groups": 0.5}


def test_prompts_that_have_not_come_for_longest_are_forgotten(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(advantages_module, "MAX_PROMPTS", 2)
    advantages = PromptAdvantages(buffer_size=4, min_count=1)
    for prompt in (CAT, DOG, CAT, Prompt("a fox")):
        advantages(torch.tensor([1.0]), [prompt])
    kept = advantages.state_dict()["buffers"]
    assert [(entry["text"], entry["rewards"]) for entry in kept] == [("a cat", [1.0, 1.0]), ("a fox", [1.0])]
    several = advantages(torch.tensor([1.0, 2.0, 3.0]), [DOG, CAT, Prompt("a fox")])  # more than are kept, at once
    assert several[2].item() == pytest.approx(1, abs=1e-5)
    assert len(advantages.state_dict()["buffers"]) == 2
