"""Prompts: `load_prompts` reads a source, `build_sampler` deals it out to iterations and processes, `deal` to
measurements."""

from __future__ import annotations

from rlcm_fast.prompts.sampler import PromptSampler, Sampler, Share, deal
from rlcm_fast.prompts.sources import BUILT_IN, check_prompts, load_prompts
from rlcm_fast.prompts.stream import PREFIX, StreamSampler

__all__ = [
    "BUILT_IN",
    "PromptSampler",
    "Sampler",
    "Share",
    "StreamSampler",
    "build_sampler",
    "check_prompts",
    "deal",
    "load_prompts",
]


def build_sampler(source: str, share: Share, field: str = "prompts.source") -> Sampler:
    """The sampler for `source`; `field`: the config field of it, for errors."""
    if source.startswith(PREFIX):
        return StreamSampler(source, share, field)
    return PromptSampler(load_prompts(source, field), share, f"{field}={source}")
