"""What one field of the config cannot know alone: checked before any weights load, with the way out in the message."""

from __future__ import annotations

import math
from pathlib import Path

from rlcm_fast.config import Config, RewardConfig
from rlcm_fast.config.algorithm_checks import check_algorithm
from rlcm_fast.config.engine_checks import check_engine
from rlcm_fast.config.ranges import check_ranges
from rlcm_fast.config.sizes import check_sizes, num_actions, num_trained
from rlcm_fast.config.tasks import check_task_names, check_tasks, rounds_of, tasks_of

_ONE_STEP = (
    "policy.num_steps=1 leaves nothing to train: the last step is deterministic (sigma = 0), it makes the image and is "
    "no action, so its log-prob has no gradient; sample with 2 steps or more (the trained model still runs with 1), "
    "or set policy.last_step=sampled, which draws the image with a small noise (renoise, the paper's, is pure variance)"
)
_BESIDE_TASKS = (
    "has no use beside tasks, each of which has its own; move it into a task, or leave it out, or set tasks=[]"
)


def validate(config: Config, world_size: int) -> None:
    """Raise ValueError "field=value ...; remedy" for the first value or combination that cannot work."""
    check_ranges(config)
    _check_use(config)
    _check_policy(config)
    check_task_names(config)
    _check_rewards(config)
    check_tasks(config, world_size)
    check_algorithm(config, num_actions(config))
    check_sizes(config, world_size)
    check_engine(config, derived(config, world_size))
    _check_lora(config)
    _check_resume(config)


def derived(config: Config, world_size: int) -> dict[str, int]:
    """The numbers that follow from the config; counts are over all processes unless the name says otherwise.

    Of updates of different sizes (tasks one by one) the largest is meant.
    """
    rounds = rounds_of(config)
    samples = [sum(task.num_samples for task in tasks) for tasks in rounds]
    trained = num_trained(config)
    transitions_per_update = max(samples) * trained // config.update.num_updates
    updates = config.update.num_passes * config.update.num_updates * len(rounds)
    return {
        "num_processes": world_size,
        "samples_per_iteration": sum(samples),
        "samples_per_process": sum(samples) // world_size,
        "actions_per_sample": num_actions(config),
        "transitions_per_iteration": sum(samples) * trained,
        "transitions_per_update": transitions_per_update,
        "micro_batches_per_update_and_process": transitions_per_update // world_size // config.update.micro_batch_size,
        "updates_per_iteration": updates,
        "total_updates": updates * config.num_iterations,
        "total_queries": sum(samples) * config.num_iterations,
    }


def _check_use(config: Config) -> None:
    """Nothing is set that another field leaves no meaning.

    A default passes, though a user may have written it: a resolved config has all of them.
    """
    if config.tasks:
        _check_beside_tasks(config)
    if not config.tasks and config.task_schedule == "by_task":
        raise ValueError("task_schedule=by_task has no tasks to take in turn; name tasks, or set task_schedule=mixed")
    if config.pretraining.weight == 0 and config.pretraining.data.strip():
        raise ValueError(
            f"pretraining.data={config.pretraining.data} has no use with pretraining.weight=0; give a weight, as 0.1, "
            "or set pretraining.data=''"
        )


def _check_beside_tasks(config: Config) -> None:
    """What every task has of its own does nothing in its section."""
    default, tasks, rewards = Config(), config.tasks, config.rewards
    source, prompts, kind = config.prompts.source, config.evaluation.prompts, config.advantages.kind
    has_prompts, has_kind = all(task.evaluation for task in tasks), all(task.advantages for task in tasks)
    idle = [
        ("prompts.source", source, source != default.prompts.source),
        ("rewards", f"[{', '.join(reward.name for reward in rewards)}]", rewards not in ([], default.rewards)),
        ("evaluation.prompts", prompts, has_prompts and prompts != default.evaluation.prompts),
        ("advantages.kind", kind, has_kind and kind != default.advantages.kind),
    ]
    for field, value, is_idle in idle:
        if is_idle:
            raise ValueError(f"{field}={value} {_BESIDE_TASKS}")


def _check_policy(config: Config) -> None:
    policy = config.policy
    most = 50 if policy.kind == "consistency" else 1000
    if policy.num_steps > most:
        raise ValueError(f"policy.num_steps={policy.num_steps} exceeds the {most} steps of {policy.kind}; give fewer")
    if num_actions(config) == 0:
        raise ValueError(_ONE_STEP)


def _check_rewards(config: Config) -> None:
    trained = {task.rewards_field: list(task.rewards) for task in tasks_of(config)}
    for field, rewards in trained.items():
        if not rewards:
            raise ValueError(f"{field}=[] leaves nothing to optimise; name one, as {{name: jpeg_compressibility}}")
        for index, reward in enumerate(rewards):
            if not math.isfinite(reward.weight) or reward.weight == 0:
                remedy = "give another, or move the reward to evaluation.rewards to only measure it"
                raise ValueError(f"{field}[{index}].weight={reward.weight} of {reward.name} has no use; {remedy}")
        _check_names(field, rewards)
    _check_names("evaluation.rewards", config.evaluation.rewards)
    for index, reward in enumerate(config.evaluation.rewards):
        _check_watched(f"evaluation.rewards[{index}]", reward, trained)


def _check_names(field: str, rewards: list[RewardConfig]) -> None:
    names = [reward.name for reward in rewards]
    for index, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"{field}[{index}].name='{name}' is empty; name a reward or package.module:Class")
        if names.index(name) < index:
            raise ValueError(f"{field}[{index}].name={name} is already in {field}; drop one")


def _check_watched(field: str, reward: RewardConfig, trained: dict[str, list[RewardConfig]]) -> None:
    """A task lacks it; where others have it they measure the same, as a name is a key of the metrics."""
    placed = [(f"{at}[{index}]", one) for at, own in trained.items() for index, one in enumerate(own)]
    same = [(at, one) for at, one in placed if one.name == reward.name]
    if len(same) == len(trained):
        of = "rewards" if len(trained) == 1 else "the rewards of every task"
        raise ValueError(
            f"{field}.name={reward.name} is already in {of}, and what is trained is always evaluated; drop one"
        )
    for other, one in same:
        if (one.arguments, one.group_size) != (reward.arguments, reward.group_size):
            raise ValueError(
                f"{field} has arguments={reward.arguments} and group_size={reward.group_size}, and {other} of the same "
                f"name {reward.name} arguments={one.arguments} and group_size={one.group_size}; give it those, or drop "
                "it"
            )


def _check_lora(config: Config) -> None:
    if not all(target.strip() for target in config.lora.targets) or not config.lora.targets:
        raise ValueError(f"lora.targets={config.lora.targets} names no layer; give names of layers, as [to_q, to_v]")


def _check_resume(config: Config) -> None:
    resume = config.resume
    if resume is not None and resume != "latest" and not Path(resume).is_dir():
        raise ValueError(f"resume={resume} is no folder; give 'latest' or a folder in {config.run_dir}/checkpoints")
