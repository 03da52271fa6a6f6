"""Groups of set rewards are whole: what can be known before anything loads."""

from __future__ import annotations

import pytest

from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate


def mistake(argv: list[str]) -> str:
    with pytest.raises(ValueError) as error:
        validate(parse_config(argv), world_size=1)
    return str(error.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("group_size: -1", "rewards[0].group_size=-1 is out of range; give 0 (all images) or more"),
        (
            "group_size: 24",
            "rewards[0].group_size=24 does not divide the 64 samples of an iteration on each process; try",
        ),
        (
            "group_size: 1, credit: leave_one_out",
            "rewards[0].credit=leave_one_out leaves nothing of a group of one image",
        ),
        ("credit: all", "credit=all is not allowed; give one of group, leave_one_out"),
    ],
)
def test_groups_of_a_set_reward_are_whole(more: str, message: str):
    assert message in mistake(["--rewards", f"[{{name: diversity, {more}}}]"])


def test_groups_are_those_of_a_process_in_a_rollout_and_of_all_in_an_evaluation():
    argv = ["--rewards", "[{name: diversity, group_size: 32}]", "--update.micro_batch_size", "48"]
    validate(parse_config(argv), world_size=2)
    with pytest.raises(
        ValueError, match="32 does not divide the 16 samples of an iteration on each process; try 16, or"
    ):
        validate(parse_config(argv), world_size=4)
    argv += ["--evaluation.num_images", "40"]
    assert "group_size=32 does not divide evaluation.num_images=40; try 20 or 40, or change" in mistake(argv)
    validate(parse_config([*argv, "--evaluation.every", "0"]), world_size=1)
