"""Tells what a run's config says of its rewards' metrics: of how many values a mean is, and whether a person gives it.

The live view and the plain lines of a run ask the same. A config is given by dotted names (reading.flat), and may be of
another version or lack parts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rlcm_fast.config.reward_checks import PERSON

Section = Mapping[str, Any]


def standard_error(config: Section, line: Mapping[str, float], key: str) -> float | None:
    """Returns the standard error of the mean of KEY, as eval/NAME, in a line of metrics.

    None if it is not known: of fewer than two values, as of a set reward of one group, of values that are all the same,
    and of the images of one size.
    """
    if is_size(key):
        return None
    deviation, count = line.get(f"{key}/std"), _num_values(config, line, key)
    # the logged deviation divides by the number of values, so it lacks one
    return deviation / math.sqrt(count - 1) if deviation and count > 1 else None


def of_person(config: Section) -> set[str]:
    """Returns the keys of rewards that a person gives, and of totals that hold one: NAME, or TASK/NAME.

    Their mean says nothing: the scores of each prompt sum to 0, whatever the images are.
    """
    keys = [key for key, reward in rewards_of(config).items() if reward.get("name") == PERSON]
    return {*keys, *(f"{key[: key.rfind('/') + 1]}total" for key in keys)}


def rewards_of(config: Section) -> dict[str, Section]:
    """Returns the section of each reward by the key of its metrics."""
    tasks = {f"{task.get('name')}/": _sections(task.get("rewards")) for task in _sections(config.get("tasks"))}
    trained = tasks or {"": _sections(config.get("rewards"))}
    watched = _sections(config.get("evaluation.rewards"))
    found = {}
    for prefix, rewards in trained.items():
        for reward in (*watched, *rewards):
            found[f"{prefix}{reward.get('label') or reward.get('name')}"] = reward
    return found


def _num_values(config: Section, line: Mapping[str, float], key: str) -> float:
    """Returns how many values a mean of held-out images is of, images or groups; 0 if that is not known.

    One group of all images counts as its images, because only the reward's class knows; it has no deviation.
    """
    num_images = config.get("evaluation.num_images")
    if not isinstance(num_images, int):
        return 0
    size = rewards_of(config).get(key.removeprefix("eval/"), {}).get("group_size")
    if isinstance(size, int) and size > 0:
        return num_images // size
    return num_images - line.get(f"{key}/skipped", 0.0)


def is_size(key: str) -> bool:
    """Tells whether a key ends in HEIGHTxWIDTH: a reward of the images of one size."""
    height, _, width = key.rpartition("/")[2].partition("x")
    return height.isdigit() and width.isdigit()


def _sections(value: object) -> list[Section]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []
