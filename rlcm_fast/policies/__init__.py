"""Samplers as Gaussian policies: tables of schedules, and one policy for each kind of network."""

from rlcm_fast.policies.base import GaussianPolicy, Network
from rlcm_fast.policies.build import build_policy, build_schedule, resolve_kind
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.policies.diffusion import DiffusionPolicy
from rlcm_fast.policies.few_step_schedules import euler_ancestral_schedule, tcd_schedule
from rlcm_fast.policies.noise import DrawnNoise, Noise, SeededNoise
from rlcm_fast.policies.schedules import NoiseLevels, Schedule, consistency_schedule, ddim_schedule

__all__ = [
    "ConsistencyPolicy",
    "DiffusionPolicy",
    "DrawnNoise",
    "GaussianPolicy",
    "Network",
    "Noise",
    "NoiseLevels",
    "Schedule",
    "SeededNoise",
    "build_policy",
    "build_schedule",
    "consistency_schedule",
    "ddim_schedule",
    "euler_ancestral_schedule",
    "resolve_kind",
    "tcd_schedule",
]
