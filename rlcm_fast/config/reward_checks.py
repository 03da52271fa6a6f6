"""Checks rewards: each has a name, once, and a weight; evaluation.rewards holds only rewards that need watching."""

from __future__ import annotations

import math

from rlcm_fast.config import RewardConfig
from rlcm_fast.config.resolved import ResolvedRun


def check_rewards(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" for the first reward that cannot be trained or watched."""
    # Rewards to train on.
    watched = run.config.evaluation.rewards
    trained = {task.rewards_field: list(task.rewards) for task in run.tasks}
    for field, rewards in trained.items():
        if not rewards:
            raise ValueError(f"{field}=[] leaves nothing to optimise; name one, as {{name: jpeg_compressibility}}")
        for index, reward in enumerate(rewards):
            if not math.isfinite(reward.weight) or reward.weight == 0:
                remedy = "give another, or move the reward to evaluation.rewards to only measure it"
                raise ValueError(f"{field}[{index}].weight={reward.weight} of {reward.name} has no use; {remedy}")
        _check_names(field, rewards)

    # Rewards to watch.
    _check_names("evaluation.rewards", watched)
    if watched and run.config.evaluation.every == 0:
        names = ", ".join(reward.name for reward in watched)
        raise ValueError(
            f"evaluation.rewards=[{names}] are never measured with evaluation.every=0; set evaluation.every=10, or "
            "evaluation.rewards=[]"
        )
    for index, reward in enumerate(watched):
        _check_watched(f"evaluation.rewards[{index}]", reward, trained)


def _check_names(field: str, rewards: list[RewardConfig]) -> None:
    names = [reward.name for reward in rewards]
    for index, name in enumerate(names):
        if not name.strip():
            raise ValueError(f"{field}[{index}].name='{name}' is empty; name a reward or package.module:Class")
        if names.index(name) < index:
            raise ValueError(f"{field}[{index}].name={name} is already in {field}; drop one")


def _check_watched(field: str, reward: RewardConfig, trained: dict[str, list[RewardConfig]]) -> None:
    """Refuses a reward that every task trains already, or that shares its name with a different one."""
    same = []  # (field, reward) of each trained reward with this name
    for at, rewards in trained.items():
        same += [(f"{at}[{index}]", other) for index, other in enumerate(rewards) if other.name == reward.name]
    if len(same) == len(trained):
        of = "rewards" if len(trained) == 1 else "the rewards of every task"
        raise ValueError(
            f"{field}.name={reward.name} is already in {of}, and what is trained is always evaluated; drop one"
        )
    for at, other in same:
        if (other.arguments, other.group_size) != (reward.arguments, reward.group_size):
            raise ValueError(
                f"{field} has arguments={reward.arguments} and group_size={reward.group_size}, and {at} of the same "
                f"name {reward.name} arguments={other.arguments} and group_size={other.group_size}; give it those, or "
                "drop it"
            )
