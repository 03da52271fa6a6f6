"""Checks rewards: each has a name, once, a weight and a place; evaluation.rewards holds only what needs watching."""

from __future__ import annotations

import math
import re

from rlcm_fast.config import Config, RewardConfig
from rlcm_fast.config.resolved import ResolvedRun, Task

_RESERVED = ("total", "diversity")  # keys of metrics beside the rewards
PERSON = "human"
"""The reward that a person gives; rlcm_fast.rating has it."""
OF_CALLS = ("calls", "images_per_call")
"""What a reward on a server may have as arguments: they say how the server is called."""


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
        _check_places(field, rewards)
    for task in run.tasks:
        _check_combination(run.config, task)
    _check_person(run)

    # Rewards to watch.
    _check_names("evaluation.rewards", watched)
    _check_places("evaluation.rewards", watched)
    if watched and run.config.evaluation.every == 0:
        names = ", ".join(reward.name for reward in watched)
        raise ValueError(
            f"evaluation.rewards=[{names}] are never measured with evaluation.every=0; set evaluation.every=10, or "
            "evaluation.rewards=[]"
        )
    for index, reward in enumerate(watched):
        _check_watched(f"evaluation.rewards[{index}]", reward, trained)


def _check_combination(config: Config, task: Task) -> None:
    """Refuses thresholds without a use, a lexicographic order without thresholds, and a scale that divides nothing."""
    how, field = task.rewards_combine, task.combine_field
    for index, reward in enumerate(task.rewards):
        where = f"{task.rewards_field}[{index}]"
        if reward.threshold is not None and how != "lexicographic":
            raise ValueError(
                f"{where}.threshold={reward.threshold:g} of {reward.key} has no use with {field}={how}; set "
                f"{field}=lexicographic, or leave it out"
            )
        is_last = index == len(task.rewards) - 1
        if how == "lexicographic" and reward.threshold is None and not is_last:
            raise ValueError(
                f"{where}.threshold of {reward.key} is missing, and {field}=lexicographic asks where it is met; give "
                "the score from which the next reward counts"
            )
    if how == "lexicographic" and len(task.rewards) == 1:
        raise ValueError(f"{field}=lexicographic has one reward and so no order; name a second one, or set sum")
    if how != "sum" and task.advantages in ("group", "leave_one_out") and config.advantages.scale == "none":
        raise ValueError(
            f"{field}={how} standardises each reward, and advantages.scale=none divides by nothing; set "
            "advantages.scale=batch or group"
        )


def _check_person(run: ResolvedRun) -> None:
    """Refuses a person's ratings where there is nothing to compare, and in a run of several processes."""
    for task in run.tasks:
        if all(reward.name != PERSON for reward in task.rewards):
            continue
        if task.images_per_prompt < 2:
            raise ValueError(
                f"{task.images_field}={task.images_per_prompt} gives reward {PERSON} nothing to compare an image with; "
                "give 2 to 8"
            )
        if run.sizes.num_processes > 1:
            raise ValueError(
                f"{task.rewards_field} with {PERSON} needs one process, and this run has {run.sizes.num_processes}; "
                "start it with python rlcm_fast/train.py or rlcm-fast rate"
            )
    for reward in run.config.evaluation.rewards:
        if reward.name == PERSON:
            raise ValueError(
                f"evaluation.rewards names {PERSON}, which rates the images that are trained on; put it into rewards"
            )


def _check_names(field: str, rewards: list[RewardConfig]) -> None:
    keys = [reward.key for reward in rewards]
    for index, reward in enumerate(rewards):
        if not reward.name.strip():
            raise ValueError(f"{field}[{index}].name='{reward.name}' is empty; name a reward or package.module:Class")
        if reward.label in _RESERVED or not re.fullmatch(r"[\w.:-]*", reward.label):
            raise ValueError(
                f"{field}[{index}].label='{reward.label}' is no label; give a word without '/', other than "
                f"{' and '.join(_RESERVED)}"
            )
        if keys.index(reward.key) == index:
            continue
        if reward.label:
            raise ValueError(f"{field}[{index}].label={reward.label} is already in {field}; give another")
        raise ValueError(
            f"{field}[{index}].name={reward.name} is already in {field}; drop one, or give each a label of its own"
        )


def _check_places(field: str, rewards: list[RewardConfig]) -> None:
    for index, reward in enumerate(rewards):
        check_place(f"{field}[{index}]", reward)


def check_place(field: str, reward: RewardConfig) -> None:
    """Raises ValueError unless device, dtype, batch_size and offload of `field` go together and with its arguments."""
    # What is said twice.
    given = {"device": reward.device != "same", "dtype": reward.dtype != "", "batch_size": reward.batch_size != 0}
    for name, is_given in given.items():
        if is_given and name in reward.arguments:
            value, other = getattr(reward, name), reward.arguments[name]
            raise ValueError(f"{field}.{name}={value} beside arguments={{{name}: {other}}} of {reward.name}; drop one")

    # A place on this machine.
    if not is_url(reward.device):
        if reward.device not in ("same", "cpu") and not re.fullmatch(r"cuda:\d+", reward.device):
            raise ValueError(f"{field}.device={reward.device} is unknown; give same, cpu, cuda:N or http://HOST:PORT")
        if reward.offload and reward.device == "cpu":
            raise ValueError(f"{field}.offload=true of {reward.name} has no use on device=cpu; drop one")
        return

    # A server, which has settings of its own.
    if reward.dtype:
        way_out = f"start the server with --arguments '{{dtype: {reward.dtype}}}', and leave it out here"
        raise ValueError(f"{field}.dtype={reward.dtype} of {reward.name} on {reward.device}; {way_out}")
    if reward.offload:
        raise ValueError(f"{field}.offload=true of {reward.name} has no use on {reward.device}; drop it")
    if reward.group_size or reward.credit != "group":
        raise ValueError(
            f"{field}.device={reward.device} of {reward.name}, which scores groups: a server does not see groups; give "
            "same, cpu or cuda:N"
        )
    strange = [name for name in reward.arguments if name not in OF_CALLS]
    if strange:
        raise ValueError(
            f"{field}.arguments.{strange[0]} of {reward.name} on {reward.device}: give it to the server, "
            f"rlcm-fast reward-server --arguments; here only {' and '.join(OF_CALLS)} count"
        )


def is_url(device: str) -> bool:
    """Tells whether the device is a server."""
    return device.startswith(("http://", "https://"))


def _check_watched(field: str, reward: RewardConfig, trained: dict[str, list[RewardConfig]]) -> None:
    """Refuses a reward that every task trains already, or that shares its name with a different one."""
    same = []  # (field, reward) of each trained reward with this name
    for at, rewards in trained.items():
        same += [(f"{at}[{index}]", other) for index, other in enumerate(rewards) if other.key == reward.key]
    for at, other in same:
        if other.name != reward.name:
            raise ValueError(
                f"{field} and {at} are both called {reward.key}, one is {reward.name} and the other {other.name}; give "
                "one of them another label"
            )
    if len(same) == len(trained):
        of = "rewards" if len(trained) == 1 else "the rewards of every task"
        called = f"label={reward.label}" if reward.label else f"name={reward.name}"
        raise ValueError(f"{field}.{called} is already in {of}, and what is trained is always evaluated; drop one")
    for at, other in same:
        if _place_of(other) != _place_of(reward):
            raise ValueError(
                f"{field} has device={reward.device} dtype={reward.dtype or 'default'} batch_size={reward.batch_size} "
                f"offload={str(reward.offload).lower()}, and {at} of the same name {reward.key} others; give it those"
            )
        if (other.arguments, other.group_size) != (reward.arguments, reward.group_size):
            raise ValueError(
                f"{field} has arguments={reward.arguments} and group_size={reward.group_size}, and {at} of the same "
                f"name {reward.key} arguments={other.arguments} and group_size={other.group_size}; give it those, or "
                "drop it"
            )


def _place_of(reward: RewardConfig) -> tuple[str, str, int, bool]:
    return reward.device, reward.dtype, reward.batch_size, reward.offload
