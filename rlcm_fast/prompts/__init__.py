"""Prompts: `load_prompts` reads a source, `PromptSampler` deals it out to iterations and processes."""

from __future__ import annotations

from rlcm_fast.prompts.sampler import PromptSampler
from rlcm_fast.prompts.sources import BUILT_IN, load_prompts

__all__ = ["BUILT_IN", "PromptSampler", "load_prompts"]
