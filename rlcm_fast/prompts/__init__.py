"""Prompts of a run.

`load_prompts` reads a source. `build_sampler` assigns its prompts to iterations and processes, `prompts_for_images`
assigns them to the images of a measurement.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rlcm_fast.given import check_is_given
from rlcm_fast.prompts.sampler import DrawnPrompts, PromptSampler, Sampler, Share, prompts_for_images
from rlcm_fast.prompts.sources import BUILT_IN, check_prompts, load_prompts
from rlcm_fast.prompts.stream import PREFIX, StreamSampler
from rlcm_fast.trajectory import Prompt

__all__ = [
    "BUILT_IN",
    "DrawnPrompts",
    "PromptSampler",
    "Sampler",
    "Share",
    "StreamSampler",
    "build_sampler",
    "check_prompts",
    "load_prompts",
    "prompts_for_images",
]


def build_sampler(
    source: str,
    share: Share,
    field: str = "prompts.source",
    given: Mapping[str, Callable[[], Prompt]] | None = None,
) -> Sampler:
    """The sampler of the prompts of `source`; errors name `field`, the config field that sets it.

    given: functions of a Python program that return the next prompt, by source.
    """
    if given and check_is_given(source, field, given):
        return DrawnPrompts(given[source], share)
    if source.startswith(PREFIX):
        return StreamSampler(source, share, field)
    return PromptSampler(load_prompts(source, field), share, f"{field}={source}")
