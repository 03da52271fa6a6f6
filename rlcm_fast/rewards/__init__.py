"""Rewards, one file each, found by name.

base, groups, asked   the protocols: of an image, of a set of images, of a person
names, building       from a name in a config to a reward
service, workers      run rewards beside the sampling
"""

from __future__ import annotations

from rlcm_fast.rewards.asked import AskingReward, PersonReward, RunPlace
from rlcm_fast.rewards.base import ImagesFailed, Reward, RewardError, SetReward, check_scores
from rlcm_fast.rewards.building import (
    RewardBuilder,
    build_reward,
    build_rewards,
    check_groups,
    check_protocol,
    grouped,
    make_placed,
    make_reward,
)
from rlcm_fast.rewards.failures import Skipping
from rlcm_fast.rewards.groups import GroupReward
from rlcm_fast.rewards.loads import gpu_bytes, gpu_load, used
from rlcm_fast.rewards.memory import RewardLoad
from rlcm_fast.rewards.names import BUILT_IN, check_name, check_reward, check_unimported, place
from rlcm_fast.rewards.offload import Movable, Offloading
from rlcm_fast.rewards.parts import inner
from rlcm_fast.rewards.service import (
    RawScores,
    Rewards,
    RewardService,
    SubmittedBatch,
    check_raw_scores,
    evaluate,
    joined,
    score,
)
from rlcm_fast.rewards.trial import Trial, asks_others
from rlcm_fast.rewards.workers import Call, DecodedImages, Workers

__all__ = [
    "BUILT_IN",
    "AskingReward",
    "Call",
    "DecodedImages",
    "GroupReward",
    "ImagesFailed",
    "Movable",
    "Offloading",
    "PersonReward",
    "RawScores",
    "Reward",
    "RewardBuilder",
    "RewardError",
    "RewardLoad",
    "RewardService",
    "Rewards",
    "RunPlace",
    "SetReward",
    "Skipping",
    "SubmittedBatch",
    "Trial",
    "Workers",
    "asks_others",
    "build_reward",
    "build_rewards",
    "check_groups",
    "check_name",
    "check_protocol",
    "check_raw_scores",
    "check_reward",
    "check_scores",
    "check_unimported",
    "evaluate",
    "gpu_bytes",
    "gpu_load",
    "grouped",
    "inner",
    "joined",
    "make_placed",
    "make_reward",
    "place",
    "score",
    "used",
]
