"""What `auto` may become, what it is on a CPU, and the next sizes that a message names."""

from __future__ import annotations

from typing import Any

import pytest

from rlcm_fast.config import Config, parse_config, to_dict
from rlcm_fast.config.batches import (
    AUTO,
    Batches,
    Candidates,
    divisors,
    has_auto,
    next_smaller,
    with_batches,
    with_numbers,
)
from rlcm_fast.config.checks import validate

ALL = ["--update.micro_batch_size=auto", "--rollout.micro_batch_size=auto", "--rollout.decode_batch_size=auto"]
TASKS = [
    "--tasks",
    "[{name: few, source: 'shapes:one', rewards: [{name: diversity}], share: 1},"
    " {name: many, source: 'shapes:one', rewards: [{name: diversity}], share: 3}]",
    "--task_schedule=by_task",
]


def test_divisors_go_from_large_to_small():
    assert divisors(1792, 64) == (64, 56, 32, 28, 16, 14, 8, 7, 4, 2, 1)
    assert divisors(7, 0) == ()


def test_numbers_of_a_cpu_are_the_largest_that_divide():
    config = parse_config([*ALL, "--prompts.num_prompts=7", "--prompts.images_per_prompt=4"])  # 28 images, 84 rows
    numbers = with_numbers(config, 1)
    assert (numbers.update.micro_batch_size, numbers.rollout.micro_batch_size) == (42, 28)
    assert numbers.rollout.decode_batch_size == 0
    assert with_numbers(Config(), 1) == Config()
    mixed = parse_config(["--update.micro_batch_size=auto", "--rollout.micro_batch_size=5"])
    assert with_numbers(mixed, 1).rollout.micro_batch_size == 5


@pytest.mark.parametrize("more", [[], ["--update.num_updates=3"], TASKS, ["--update.num_timesteps=2"]], ids=str)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_candidate_is_accepted(more: list[str], world_size: int):
    config = parse_config([*ALL, *more])
    found = Candidates.of(config, world_size)
    assert found.update == tuple(sorted(found.update, reverse=True)) and found.update[-1] == 1
    assert found.update[0] > 8 and found.rollout[0] >= 4 and found.decode == (16, 8, 4, 2, 1)
    for update in found.update:
        validate(with_batches(config, Batches(update, found.rollout[0], 1)), world_size)


def test_an_update_in_the_backward_pass_is_one_micro_batch():
    settings = ["--engine.optimizer_in_backward=true", "--optimizer.name=adamw_8bit"]
    config = parse_config(["--update.micro_batch_size=auto", *settings])
    assert Candidates.of(config, 1).update == (192,)
    validate(config, 1)


def test_a_checked_config_keeps_its_auto_and_counts_with_numbers():
    run = validate(parse_config(ALL), 2)
    assert run.config.update.micro_batch_size == AUTO and has_auto(run.config)
    assert run.sizes.micro_batches_per_update_and_process == 2  # 96 transitions in micro-batches of 48


def test_auto_travels_through_files(tmp_path: Any):
    config = parse_config(ALL)
    file = tmp_path / "auto.yaml"
    file.write_text(f"update:\n  micro_batch_size: auto\nrollout: {to_dict(config)['rollout']}\n")
    assert parse_config([f"--config={file}"]) == config


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--update.micro_batch_size=0", "update.micro_batch_size=0 is out of range; give 1 or more, or auto"),
        ("--rollout.micro_batch_size=many", "micro_batch_size=many is not allowed; give a whole number or auto"),
        ("--engine.memory_gib=-1", "engine.memory_gib=-1.0 is out of range; give GiB, or 0 for all that the GPU has"),
    ],
)
def test_other_values_are_refused_in_one_line(option: str, message: str):
    with pytest.raises(ValueError) as caught:
        validate(parse_config([option]), 1)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_next_smaller_sizes_divide_too():
    config = parse_config(["--update.micro_batch_size=48", "--rollout.micro_batch_size=64"])
    assert next_smaller(config, 1) == (32, 32)
    smallest = parse_config(["--update.micro_batch_size=1", "--rollout.micro_batch_size=1"])
    assert next_smaller(smallest, 1) == (None, None)
