from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from rlcm_fast import plug_in
from rlcm_fast.rewards import GroupReward, build_reward
from rlcm_fast.rewards.parity import DistributionParity
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt("a person")] * 4


@plug_in
class Declared:
    """A classifier of three classes that cannot be called."""

    num_classes = 3


@plug_in
class Answering:
    """A classifier whose answer is an argument."""

    def __init__(self, answer: list) -> None:
        self.answer = torch.tensor(answer)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return self.answer


def parity(answer: list, **settings) -> float:
    reward = DistributionParity(f"{__name__}:Answering", classifier_arguments={"answer": answer}, **settings)
    described = reward.describe(torch.zeros(len(answer), 3, 8, 8), PROMPTS[: len(answer)])
    return reward.value(described[None]).item()


def test_it_is_minus_the_squared_distance_to_the_target():
    votes = [[0.9, 0.1], [0.5, 0.5], [0.7, 0.3], [0.3, 0.7]]  # p_hat = (0.6, 0.4)
    assert parity(votes) == pytest.approx(-2 * 0.1**2)
    assert parity(votes, target=[0.6, 0.4]) == pytest.approx(0, abs=1e-12)
    assert parity(votes, target=[1, 0]) == pytest.approx(-2 * 0.4**2)
    assert parity(votes, votes="hard") == pytest.approx(-2 * 0.25**2)  # three of four: a draw goes to the first class
    assert parity([[0.2, 0.5, 0.3]] * 3) == pytest.approx(
        -((1 / 3 - 0.2) ** 2 + (0.5 - 1 / 3) ** 2 + (1 / 3 - 0.3) ** 2)
    )


def test_hard_votes_are_for_the_largest_of_any_scores():
    assert parity([[-3.0, 2.0, 7.0], [8.0, 2.0, 7.0]], votes="hard") == pytest.approx(
        -(2 * (1 / 6) ** 2 + (1 / 3) ** 2)
    )


def test_images_without_a_vote_do_not_count():
    assert parity([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]]) == pytest.approx(0)
    assert parity([[1.0, 0.0], [0.0, 0.0]], votes="hard") == pytest.approx(-0.5)


@pytest.mark.parametrize("votes", ["soft", "hard"])
def test_a_group_without_any_vote_has_the_worst_value(votes: str):
    assert parity([[0.0, 0.0]], votes=votes) == pytest.approx(-0.5)
    target = [0.5, 0.3, 0.2]
    one_sided = [parity([row], target=target, votes=votes) for row in torch.eye(3).tolist()]
    assert parity([[0.0] * 3], target=target, votes=votes) == pytest.approx(min(one_sided))


def test_groups_are_valued_together_as_one_by_one():
    reward = DistributionParity("shapes_colour")
    described = torch.rand(3, 4, 6).softmax(dim=2)
    described[1] = 0
    torch.testing.assert_close(reward.value(described), torch.cat([reward.value(group[None]) for group in described]))


@pytest.mark.parametrize(
    ("answer", "settings", "message"),
    [
        ([[0.5, 0.4]], {}, "votes=soft needs probabilities"),
        ([[1.5, -0.5]], {}, "votes=soft needs probabilities"),
        ([[0.5, 0.5]], {"target": [0.5, 0.25, 0.25]}, "is not one number for each of 2 classes"),
        ([[float("nan"), 0.5]], {"votes": "hard"}, r"returned scores of shape \(1, 2\); return \(B, A\), all finite"),
        ([0.5, 0.5], {}, r"returned scores of shape \(2,\); return \(B, A\)"),
    ],
)
def test_an_answer_that_cannot_be_votes_is_refused(answer: list, settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        parity(answer, **settings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classifier": "shapes_colour", "votes": "loud"}, "votes=loud is unknown; give soft"),
        ({"classifier": "shapes_colour", "target": [0.5, 0.6]}, "target=.0.5, 0.6. is no distribution"),
        ({"classifier": "shapes_colour", "target": []}, "target=.. is no distribution"),
        ({"classifier": "shapes_colour", "target": 0.5}, "target=0.5 is not allowed; give a list"),
        ({"classifier": "shapes_colour", "target": ["a", "b"]}, "is no distribution"),
        ({"classifier": "shapes_colour", "target": [1.5, -0.5]}, "is no distribution"),
        (
            {"classifier": "shapes_colour", "target": [0.5, 0.5]},
            "target=.0.5, 0.5. is not one number for each of 6 classes; give 6 numbers, or leave it out",
        ),
        ({"classifier": f"{__name__}:Declared", "target": [1.0]}, "is not one number for each of 3 classes"),
        ({"classifier": "shape_colour"}, "classifier=shape_colour is not known; did you mean shapes_colour"),
        ({}, "missing a required argument: 'classifier'"),
    ],
)
def test_a_mistake_is_named_before_any_image(arguments: dict, message: str):
    with pytest.raises(ValueError, match=f"rewards: name=distribution_parity .*{message}"):
        build_reward("distribution_parity", arguments)


def test_on_shapesworld_it_needs_no_classifier_of_ones_own():
    reward = build_reward("distribution_parity", {"classifier": "shapes_colour"}, group_size=2)
    assert isinstance(reward, GroupReward)
    blank = reward(torch.full((4, 3, 64, 64), 0.5), PROMPTS)  # no shape in any
    torch.testing.assert_close(blank, torch.full((4,), -5 / 6))
