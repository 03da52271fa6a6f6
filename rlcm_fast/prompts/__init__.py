"""Prompts: `load_prompts` reads a source, `PromptSampler` deals it out to iterations and processes,
`deal` to measurements."""

from __future__ import annotations

from rlcm_fast.prompts.sampler import PromptSampler, deal
from rlcm_fast.prompts.sources import BUILT_IN, load_prompts

__all__ = ["BUILT_IN", "PromptSampler", "deal", "load_prompts"]
