"""Prompts: `load_prompts` reads a source, `build_sampler` deals it out to iterations and processes, `deal` to
measurements."""

from __future__ import annotations

from rlcm_fast.prompts.sampler import PromptSampler, Sampler, deal
from rlcm_fast.prompts.sources import BUILT_IN, check_prompts, load_prompts
from rlcm_fast.prompts.stream import PREFIX, StreamSampler

__all__ = [
    "BUILT_IN",
    "PromptSampler",
    "Sampler",
    "StreamSampler",
    "build_sampler",
    "check_prompts",
    "deal",
    "load_prompts",
]


def build_sampler(
    source: str,
    num_prompts: int,
    images_per_prompt: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    task: str = "default",
    field: str = "prompts.source",
) -> Sampler:
    """The sampler for `source`; num_prompts: of an iteration on THIS rank.

    Every prompt it draws carries `task`; with "default" each keeps the label that its source gives it. `field`: the
    config field of `source`, for errors.
    """
    share = (num_prompts, images_per_prompt, seed, rank, world_size, task)
    if source.startswith(PREFIX):
        return StreamSampler(source, *share, field=field)
    return PromptSampler(load_prompts(source, field), *share)
