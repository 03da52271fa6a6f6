"""What an algorithm asks of the rest of the config."""

from __future__ import annotations

import pytest

from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate


def options(text: str) -> list[str]:
    return [f"--{item}" for item in text.split()]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("algorithm.name=reinforce update.num_updates=2", "only the first of 2 updates per rollout would be right"),
        ("algorithm.name=dpok", "update.kl_weight=0 switches it off"),
        ("algorithm.name=grpo", "advantages.kind=prompt does not; set advantages.kind=group"),
        ("algorithm.name=rebel prompts.images_per_prompt=3", "images_per_prompt=3 leaves an image without another"),
        ("algorithm.name=rebel update.num_timesteps=2", "update.num_timesteps=2 and update.order=mixed leave it half"),
        (
            "algorithm.name=rebel update.step_weights=sensitivity",
            "step_weights=sensitivity would weigh",
        ),
        (
            "algorithm.name=rebel prompts.num_prompts=3 update.num_updates=4 update.micro_batch_size=9",
            "update.num_updates=4 does not divide the 6 pairs of images .* try 3 or 6",
        ),
        ("update.num_timesteps=4", "update.num_timesteps=4 exceeds the 3 actions of policy.num_steps=4"),
        ("update.order=by_step update.num_updates=2", "does not divide the 3 trained actions .*; try 3"),
        ("algorithm.eta=0", "algorithm.eta=0.0 is out of range"),
        ("algorithm.temperature=-1", "algorithm.temperature=-1.0 is out of range"),
    ],
)
def test_what_an_algorithm_cannot_do_is_one_line(text: str, problem: str):
    with pytest.raises(ValueError, match=problem):
        validate(parse_config(options(text)), 1)


@pytest.mark.parametrize(
    "text",
    [
        "algorithm.name=reinforce",
        "algorithm.name=dpok update.kl_weight=0.1 update.num_updates=2 update.micro_batch_size=48",
        "algorithm.name=grpo advantages.kind=group advantages.scale=group",
        "algorithm.name=grpo advantages.kind=leave_one_out advantages.scale=none",
        "algorithm.name=rebel update.num_updates=4 update.micro_batch_size=48",
        "algorithm.name=rwr update.num_passes=2",
        "policy.kind=ddim policy.num_steps=50 update.num_timesteps=5 update.num_updates=5 update.order=by_step",
    ],
)
def test_what_each_can_is_accepted(text: str):
    validate(parse_config(options(text)), 1)


def test_subsampled_steps_are_counted_as_what_is_trained():
    text = "policy.kind=ddim policy.num_steps=50 update.num_timesteps=5 update.num_updates=5 update.order=by_step"
    sizes = validate(parse_config(options(text)), 1).sizes
    assert (sizes.actions_per_sample, sizes.trained_actions_per_sample) == (49, 5)
    assert (sizes.transitions_per_iteration, sizes.transitions_per_update, sizes.updates_per_iteration) == (320, 64, 5)
