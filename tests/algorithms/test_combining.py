"""Several rewards: sums as ever, rewards by themselves, rewards in order."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from rlcm_fast.algorithms import Combined, Scores, TaskAdvantages, Weighted, build_advantages, build_combined
from rlcm_fast.config import AdvantagesConfig
from rlcm_fast.trajectory import Prompt

KINDS = ("prompt", "batch", "group", "leave_one_out")
PROMPTS = [Prompt(text, task) for text, task in (("a", "x"), ("b", "x"), ("c", "y")) for _ in range(4)]
CONFIG = AdvantagesConfig(buffer_size=8, min_count=3)


def scores_of(columns: Tensor, weights: tuple[float, ...]) -> Scores:
    total = torch.stack([weight * column for weight, column in zip(weights, columns.unbind(1), strict=True)]).sum(dim=0)
    return Scores(total, columns)


def columns(*scales: float, seed: int = 0) -> Tensor:
    drawn = torch.randn(len(PROMPTS), len(scales), generator=torch.Generator().manual_seed(seed))
    return drawn * torch.tensor(scales)


def combined(how: str, kind: str = "group", thresholds: tuple[float | None, ...] = (None, None)) -> Combined:
    rewards = [Weighted(name, 1.0, threshold) for name, threshold in zip("pq", thresholds, strict=True)]
    return build_combined(kind, how, CONFIG, rewards)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_is_bitwise_the_advantages_of_the_total_and_keeps_their_state(kind: str):
    summed, plain = combined("sum", kind), build_advantages(kind, CONFIG)
    for seed in range(3):
        scores = scores_of(columns(1.0, 5.0, seed=seed), (1.0, 1.0))
        assert torch.equal(summed(scores, PROMPTS), plain(scores.total, PROMPTS))
    assert summed.state_dict() == plain.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["normalised", "lexicographic"])
def test_scales_of_rewards_do_not_matter(kind: str, how: str):
    plain = combined(how, kind, (0.0, None) if how == "lexicographic" else (None, None))
    scaled = combined(how, kind, (0.0, None) if how == "lexicographic" else (None, None))
    for seed in range(3):
        raw = columns(1.0, 1.0, seed=seed)
        one = plain(scores_of(raw, (1.0, 1.0)), PROMPTS)
        other = scaled(scores_of(raw * torch.tensor([100.0, 1.0]), (1.0, 1.0)), PROMPTS)
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)  # epsilon beside a deviation of 0.5
        summed = combined("sum", kind)(scores_of(raw * torch.tensor([100.0, 1.0]), (1.0, 1.0)), PROMPTS)
    assert not torch.allclose(summed, other, atol=0.1)


def test_normalised_is_gdpo():
    raw = columns(3.0, 0.2)
    found = build_combined("group", "normalised", AdvantagesConfig(scale="group"), [Weighted("p", 2), Weighted("q", 1)])
    advantages = found(scores_of(raw, (2.0, 1.0)), PROMPTS)
    grouped = raw.double().reshape(3, 4, 2)
    each = (grouped - grouped.mean(dim=1, keepdim=True)) / grouped.std(dim=1, keepdim=True, correction=0)
    total = (each * torch.tensor([2.0, 1.0])).sum(dim=2).flatten()
    expected = (total - total.mean()) / total.std(correction=0)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-5)
    parts = found.parts()
    torch.testing.assert_close(parts["p"] + parts["q"], advantages)


def test_two_ways_to_earn_the_same_sum_stay_apart():
    """GDPO's example: rewards of (0, 1) and (0, 2) in pairs are one advantage for a summed and normalised reward."""
    prompts = [Prompt("a")] * 2 + [Prompt("b")] * 2
    raw = torch.tensor([[0.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    config = AdvantagesConfig(scale="group")
    rewards = [Weighted("p", 1.0), Weighted("q", 1.0)]
    summed = build_combined("group", "sum", config, rewards)(scores_of(raw, (1.0, 1.0)), prompts)
    apart = build_combined("group", "normalised", config, rewards)(scores_of(raw, (1.0, 1.0)), prompts)
    assert summed[1] == pytest.approx(summed[3].item(), rel=1e-4)
    assert apart[3] == pytest.approx(2 * apart[1].item(), rel=1e-4)


def test_the_second_reward_counts_where_the_first_is_met_and_the_first_up_to_its_threshold():
    prompts = [Prompt("a")] * 6
    first = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    second = torch.tensor([9.0, 9.0, -9.0, 1.0, 2.0, 3.0])
    found = combined("lexicographic", "batch", (3.0, None))
    scores = scores_of(torch.stack([first, second], dim=1), (1.0, 1.0))
    advantages = found(scores, prompts)
    parts = found.parts()
    assert parts["q"][:3].tolist() == [0, 0, 0]
    assert parts["q"][4] == 0 and parts["q"][5] == -parts["q"][3] > 0
    assert parts["p"][3] == parts["p"][4] == parts["p"][5]  # more than enough is not better
    assert parts["p"][:4].diff().min() > 0
    assert advantages.square().mean().sqrt() == pytest.approx(1, abs=1e-4)
    assert found.metrics()["p/met"] == 0.5


def test_a_reward_of_negative_weight_is_met_from_below():
    rewards = [Weighted("p", -1.0, 1.0), Weighted("q", 1.0)]
    found = build_combined("batch", "lexicographic", CONFIG, rewards)
    raw = torch.tensor([[0.0, 1.0], [1.0, 2.0], [2.0, 9.0], [3.0, 9.0]])
    found(scores_of(raw, (-1.0, 1.0)), [Prompt("a")] * 4)
    parts = found.parts()
    assert parts["q"].tolist()[2:] == [0, 0] and parts["q"][1] > 0 > parts["q"][0]
    assert parts["p"][0] == parts["p"][1] > parts["p"][2] > parts["p"][3]


@pytest.mark.parametrize("how", ["sum", "normalised", "lexicographic"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_image_without_a_score_has_no_advantage_and_nothing_notices_it(how: str, kind: str):
    thresholds = (0.0, None) if how == "lexicographic" else (None, None)
    raw = columns(1.0, 1.0)
    raw[5, 1] = math.nan
    rest = [place for place in range(len(PROMPTS)) if place != 5]
    one, other = combined(how, kind, thresholds), combined(how, kind, thresholds)
    advantages = one(scores_of(raw, (1.0, 1.0)), PROMPTS)
    without = other(scores_of(raw[rest], (1.0, 1.0)), [PROMPTS[place] for place in rest])
    assert advantages[5].isnan()
    assert torch.equal(advantages[rest], without)
    assert one.state_dict() == other.state_dict()
    assert all(math.isfinite(value) for value in one.metrics().values())
    raw[:, 0] = math.nan
    assert one(scores_of(raw, (1.0, 1.0)), PROMPTS).isnan().all()


@pytest.mark.parametrize("how", ["sum", "normalised"])
def test_images_without_a_difference_keep_exactly_no_signal(how: str):
    raw = columns(1.0, 1.0)
    raw[4:8] = 2.5
    advantages = combined(how)(scores_of(raw, (1.0, 1.0)), PROMPTS)
    assert advantages[4:8].tolist() == [0, 0, 0, 0] and advantages[:4].abs().min() > 0


def test_the_correlation_shows_which_reward_is_drowned():
    raw = columns(100.0, 1.0)
    for how, drowned in (("sum", True), ("normalised", False)):
        found = combined(how)
        found(scores_of(raw, (1.0, 1.0)), PROMPTS)
        metrics = found.metrics()
        assert metrics["p/correlation"] > 0.3
        assert (abs(metrics["q/abs_mean"]) < 0.1) == drowned
        assert (metrics["q/abs_mean"] > 0.3) != drowned


def test_each_reward_keeps_its_statistics_in_a_checkpoint():
    one, resumed = combined("normalised", "prompt"), combined("normalised", "prompt")
    one(scores_of(columns(1.0, 9.0), (1.0, 1.0)), PROMPTS)
    resumed.load_state_dict(json.loads(json.dumps(one.state_dict())))
    later = scores_of(columns(1.0, 9.0, seed=4), (1.0, 1.0))
    assert torch.equal(one(later, PROMPTS), resumed(later, PROMPTS))
    anew = combined("normalised", "prompt")
    anew.load_state_dict({})  # of another way to combine
    assert anew.state_dict() == combined("normalised", "prompt").state_dict()


def test_each_task_combines_its_rewards_in_its_way():
    by_task = {"x": combined("sum"), "y": combined("normalised")}
    scores = scores_of(columns(1.0, 3.0), (1.0, 1.0))
    found = TaskAdvantages(by_task)
    advantages = found(scores, PROMPTS)
    x, y = list(range(8)), list(range(8, 12))
    assert torch.equal(advantages[:8], combined("sum")(scores[x], PROMPTS[:8]))
    assert torch.equal(advantages[8:], combined("normalised")(scores[y], PROMPTS[8:]))
    parts = found.parts()
    assert set(parts) == {"x/p", "x/q", "y/p", "y/q"}
    assert parts["x/p"][8:].tolist() == [0] * 4 and parts["y/p"][:8].tolist() == [0] * 8
    torch.testing.assert_close(parts["y/p"] + parts["y/q"], torch.cat([torch.zeros(8), advantages[8:]]))
    torch.testing.assert_close(parts["x/p"][:8] + parts["x/q"][:8], advantages[:8], rtol=1e-3, atol=1e-3)
