"""How `sample` and `evaluate` draw: as the arguments say, else as in the run that made the model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import Any

from rlcm_fast.cli.arguments import check_negative
from rlcm_fast.cli.policy_scheduler import PolicyScheduler
from rlcm_fast.config import PolicyConfig
from rlcm_fast.run_folder.sampler_file import read_sampler

# What the calls of stock pipelines do with other models: four steps at guidance 4; TCD draws with gamma 0.3, DDIM
# without noise.
_STOCK = PolicyConfig(num_steps=4, guidance_scale=4.0)
_ETA = {"TCDScheduler": 0.3, "DDIMScheduler": 0.0, "PNDMScheduler": 0.0}


@dataclass(frozen=True)
class Sampling:
    """What a pipeline is called with."""

    num_steps: tuple[int, ...]  # one or several numbers
    guidance_scale: float

    @classmethod
    def settle(cls, pipeline: Any, arguments: argparse.Namespace) -> Sampling:
        """Settles what the arguments leave open, and gives the pipeline the sampler of the model's run.

        The pipeline of another model keeps its scheduler, unless the arguments name timesteps.

        Raises:
            ValueError: the model's scheduler has no such timesteps, or does not say what it is; or there is a negative
                prompt and no guidance.
        """
        # Find how the run drew, and what the arguments change.
        trained = read_sampler(arguments.model, arguments.revision)
        if trained is None and arguments.lora is not None:
            trained = read_sampler(arguments.lora)
        policy = _stock(pipeline) if trained is None else trained
        if arguments.timesteps:
            policy = replace(policy, num_steps=len(arguments.timesteps), timesteps=arguments.timesteps)
        guidance = policy.guidance_scale if arguments.guidance_scale is None else arguments.guidance_scale
        check_negative(arguments.negative, guidance)

        # Let the pipeline draw so.
        if trained is not None or arguments.timesteps:
            pipeline.scheduler = PolicyScheduler(policy, pipeline.unet.config, pipeline.scheduler)
        return cls(tuple(arguments.num_steps or [policy.num_steps]), guidance)


def sampler_of(pipeline: Any) -> str:
    """Says what a pipeline draws with, after it has drawn."""
    scheduler = pipeline.scheduler
    return str(scheduler.schedule) if isinstance(scheduler, PolicyScheduler) else type(scheduler).__name__


def _stock(pipeline: Any) -> PolicyConfig:
    return replace(_STOCK, eta=_ETA.get(type(pipeline.scheduler).__name__, _STOCK.eta))
