from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from rlcm_fast.plugins import load_class
from rlcm_fast.rewards import BUILT_IN, Reward, RewardError, build_reward, check_protocol, check_scores
from rlcm_fast.rewards.jpeg import JpegCompressibility
from rlcm_fast.trajectory import Prompt

PROMPTS = [Prompt("a cat"), Prompt("a dog")]


def test_good_scores_pass_through_unchanged():
    values = torch.tensor([1.0, -2.0])
    assert check_scores("size", values, PROMPTS, iteration=3) is values


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_reward_prompt_and_iteration(bad: float):
    with pytest.raises(RewardError, match=r"reward 'size', prompt 'a dog', iteration 3: returned -?(nan|inf) for"):
        check_scores("size", torch.tensor([1.0, bad]), PROMPTS, iteration=3)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (torch.zeros(3), r"torch.float32 of shape \(3,\)"),
        (torch.zeros(2, 1), r"torch.float32 of shape \(2, 1\)"),
        (torch.zeros(()), r"of shape \(\)"),
        (torch.zeros(2, dtype=torch.float64), "torch.float64 of shape"),
        (torch.zeros(2, dtype=torch.int64), "torch.int64 of shape"),
        ([1.0, 2.0], "returned list"),
        (None, "returned NoneType"),
    ],
)
def test_what_is_no_score_per_image_names_what_came_and_what_is_wanted(values: object, problem: str):
    with pytest.raises(RewardError, match=rf"reward 'size', prompt 'a cat', iteration 0: .*{problem}.*\(2,\)"):
        check_scores("size", values, PROMPTS, iteration=0)


class NotAReward:
    pass


class WrongScope:
    scope = "set"  # without its two halves

    def __call__(self, images: torch.Tensor, prompts: object) -> torch.Tensor:
        return images.mean(dim=(1, 2, 3))


class GreenReward(WrongScope):
    scope = "image"


def test_a_built_in_reward_is_made_with_its_arguments():
    reward = build_reward("jpeg_compressibility", {"quality": 50})
    assert isinstance(reward, JpegCompressibility) and reward.quality == 50
    assert isinstance(reward, Reward)


def computes_on_models(name: str) -> bool:
    """Whether the reward needs files; those are tested with small models in the files of their own."""
    return getattr(load_class(name, BUILT_IN), "FACTS", None) is not None


OF_A_PERSON = ("human", "ratings")  # they need a person, or a file of ratings; tests/rating/ has both
SCORING = [name for name in BUILT_IN if name not in OF_A_PERSON and not computes_on_models(name)]


@pytest.mark.parametrize("name", SCORING)
def test_every_built_in_reward_scores_images(name: str):
    prompts = [Prompt("a red circle"), Prompt("a blue star")]
    arguments = {"classifier": "shapes_colour"} if name == "distribution_parity" else {}
    scores = build_reward(name, arguments)(torch.rand(2, 3, 64, 64), prompts)
    assert check_scores(name, scores, prompts, iteration=0) is scores


def test_a_reward_of_the_users_own_is_found_by_module_and_class():
    assert type(build_reward(f"{__name__}:GreenReward", {})).__name__ == "GreenReward"


def test_an_unknown_reward_lists_the_known_ones():
    with pytest.raises(ValueError, match="jpeg_compresibility") as caught:
        build_reward("jpeg_compresibility", {})
    assert "jpeg_compressibility" in str(caught.value) and "shapes_alignment" in str(caught.value)


def test_an_unknown_argument_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"name=jpeg_compressibility .*'quailty'; it accepts quality"):
        build_reward("jpeg_compressibility", {"quailty": 95})


def test_a_bad_argument_names_the_reward_and_the_remedy():
    with pytest.raises(ValueError, match=r"name=jpeg_incompressibility.*quality=0 .*from 1 to 100"):
        build_reward("jpeg_incompressibility", {"quality": 0})


def test_a_class_that_is_no_reward_is_refused_before_it_is_used():
    with pytest.raises(ValueError, match=r'NotAReward does not say that a config may name it, .* scope = "image"'):
        build_reward(f"{__name__}:NotAReward", {})
    for name, made in (("WrongScope", WrongScope()), ("NotAReward", NotAReward())):
        with pytest.raises(ValueError, match=f"{name}, which is no reward; give it an attribute .* and value"):
            check_protocol(name, made, "rewards")
    with pytest.raises(ValueError, match="WrongScope, which is no reward; give it an attribute .* and value"):
        build_reward(f"{__name__}:WrongScope", {})


@pytest.mark.parametrize("name", [name for name in BUILT_IN if computes_on_models(name)])
def test_the_facts_of_a_reward_on_models_are_complete(name: str):
    facts = load_class(name, BUILT_IN).FACTS
    assert facts.formula and facts.likes
    assert all(weights.licence and weights.gigabytes > 0 for weights in facts.weights)
    assert facts.million_parameters > 0 or not any(weights.files for weights in facts.weights)


def test_the_page_of_rewards_on_models_says_what_their_facts_say():
    page = (Path(__file__).parents[2] / "docs" / "rewards_models.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    found = []
    for name, *cells in rows:
        for built_in in re.findall(r"`(\w+)`", name.partition(",")[0]):
            facts = getattr(load_class(built_in, BUILT_IN), "FACTS", None) if built_in in BUILT_IN else None
            if facts is None:
                continue
            found.append(built_in)
            if len(cells) == 2:
                assert cells == [facts.formula, facts.likes]
                continue
            sources, licences, gigabytes, gib, _ = cells
            assert facts.weights[0].source in sources and facts.weights[0].licence in licences
            assert float(gigabytes) == pytest.approx(facts.gigabytes, abs=0.006)
            assert float(gib) == pytest.approx(4e6 * facts.million_parameters / 2**30, abs=0.006)
    mine = {"aesthetic", "aesthetic_v2_5", "clip_score", "pickscore", "hps_v2", "image_reward", "geneval"}
    assert all(found.count(name) == 2 for name in mine)
