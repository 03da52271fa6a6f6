"""What follows from a config: tasks, rounds and sizes, worked out once."""

from __future__ import annotations

import dataclasses

import pytest

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve

SHARES = (
    "[{name: a, source: 'shapes:one', rewards: [{name: r}], share: 3, images_per_prompt: 2, advantages: batch}, "
    "{name: b, source: 'shapes:two', rewards: [{name: s}], evaluation: 'shapes:two:held_out'}]"
)


def test_sizes_follow_from_the_config():
    argv = "--prompts.num_prompts 8 --prompts.images_per_prompt 4 --policy.num_steps 5 --num_iterations 10"
    more = ["--update.num_passes=3", "--update.num_updates=2", "--update.micro_batch_size=8"]
    real = ["--pretraining.weight=1", "--pretraining.data=shapes:all", "--pretraining.micro_batch_size=16"]
    run = validate(parse_config([*argv.split(), *more, *real]), world_size=2)
    assert dataclasses.asdict(run.sizes) == {
        "num_processes": 2,
        "samples_per_iteration": 32,
        "samples_per_process": 16,
        "samples_per_rollout": 32,
        "actions_per_sample": 4,
        "trained_actions_per_sample": 4,
        "transitions_per_iteration": 128,
        "transitions_per_update": 64,
        "micro_batches_per_update_and_process": 4,
        "real_image_micro_batches": 2,
        "updates_per_iteration": 6,
        "total_updates": 60,
        "total_queries": 320,
    }


def test_without_real_images_an_update_has_no_micro_batches_of_them():
    assert resolve(Config(), 1).sizes.real_image_micro_batches == 0


def test_a_config_without_tasks_is_one_task_in_one_round():
    run = resolve(Config(), 1)
    assert not run.has_tasks
    assert run.rounds == (run.tasks,)
    (task,) = run.tasks
    assert (task.name, task.source, task.evaluation) == ("default", "shapes:one", "shapes:one:held_out")
    assert (task.num_prompts, task.images_per_prompt, task.num_samples, task.advantages) == (16, 4, 64, "prompt")
    assert (task.source_field, task.rewards_field) == ("prompts.source", "rewards")


def test_tasks_divide_a_batch_by_their_shares_and_take_from_the_sections_what_they_leave_out():
    run = resolve(parse_config(["--tasks", SHARES, "--advantages.kind", "group"]), 1)
    first, second = run.tasks
    assert run.has_tasks
    assert [(task.num_prompts, task.images_per_prompt, task.num_samples) for task in run.tasks] == [
        (24, 2, 48),
        (4, 4, 16),
    ]
    assert (first.advantages, second.advantages) == ("batch", "group")
    assert (first.evaluation, second.evaluation) == ("shapes:one:held_out", "shapes:two:held_out")
    assert (first.advantages_field, second.advantages_field) == ("tasks[0].advantages", "advantages.kind")
    assert (first.images_field, second.images_field) == ("tasks[0].images_per_prompt", "prompts.images_per_prompt")


def test_tasks_in_turn_have_a_round_each_and_the_largest_sets_the_sizes():
    mixed, in_turn = (
        resolve(parse_config(["--tasks", SHARES, f"--task_schedule={s}"]), 1) for s in ("mixed", "by_task")
    )
    assert mixed.rounds == (mixed.tasks,)
    assert in_turn.rounds == tuple((task,) for task in in_turn.tasks)
    assert (mixed.sizes.samples_per_rollout, in_turn.sizes.samples_per_rollout) == (64, 48)
    assert in_turn.sizes.updates_per_iteration == 2 * mixed.sizes.updates_per_iteration


def test_a_share_that_makes_no_whole_prompts_stays_a_fraction_which_the_checks_refuse():
    config = parse_config(["--tasks", SHARES, "--prompts.num_prompts", "5"])
    assert resolve(config, 1).tasks[1].num_prompts == 1.25
    with pytest.raises(ValueError, match=r"gives task a 7\.5 prompts with 2 images each of the 20 images"):
        validate(config, 1)


def test_a_resolved_run_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(Config(), 1).sizes.total_queries = 0  # pyright: ignore[reportAttributeAccessIssue]
