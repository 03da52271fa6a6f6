"""Keeps libraries quiet, so that the first lines of a run are its own; `--debug true` shows what they print.

Imports nothing heavy: most of these messages appear while a library is imported, so the doors call `hush_libraries`
before they import torch. These stay visible: exceptions and logged errors, our own lines, warnings from your plug-ins,
warnings that something falls back, and transformers' report on a reward's model whose file lacks weights.
"""

from __future__ import annotations

import logging
import os
import warnings

_DEBUG = "RLCM_FAST_DEBUG"  # an environment variable, because processes that a run starts inherit it
_LEVELS = {  # each library reads its variable when it is imported; a level that you set yourself stays
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "KINETO_LOG_LEVEL": "99",  # of torch.profiler, which reads it when it first starts
}
_LIBRARIES = "accelerate|bitsandbytes|deepspeed|diffusers|huggingface_hub|peft|torch|transformers|triton"
_FALLBACK = r"(?si).*(fall(s|ing)? back|not supported)"  # nothing falls back silently
MISSING_WEIGHTS = "transformers.modeling_utils"
"""The logger that reports a model whose file lacks weights."""


def hush_libraries(debug: bool) -> None:
    """Hides library warnings and advice in this process; processes that it starts inherit `_LEVELS` and `debug`.

    With `debug` nothing is hidden.
    """
    os.environ[_DEBUG] = str(int(debug))
    if debug:
        return
    for variable, level in _LEVELS.items():
        os.environ.setdefault(variable, level)
    warnings.filterwarnings("ignore", module=rf"({_LIBRARIES})(\.|$)")
    warnings.filterwarnings("default", message=_FALLBACK, category=UserWarning)
    logging.getLogger("bitsandbytes").setLevel("ERROR")
    logging.getLogger("DeepSpeed").addFilter(_is_error)  # a filter, because importing DeepSpeed sets the level
    # TRANSFORMERS_VERBOSITY would hide that a reward's model starts with random weights.
    logging.getLogger(MISSING_WEIGHTS).setLevel("WARNING")


def is_debug() -> bool:
    """Whether libraries may print what they like."""
    return os.environ.get(_DEBUG) == "1"


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
