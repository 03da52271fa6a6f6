"""Fine-tunes few-step text-to-image models with reinforcement learning; `rlcm_fast.fine_tune` does so from Python."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcm_fast.api import Run, fine_tune

__all__ = ["Run", "fine_tune"]


def __getattr__(name: str) -> object:
    """Imports what `__all__` names when it is first used, so that `import rlcm_fast` imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'rlcm_fast' has no attribute {name!r}")
    return getattr(importlib.import_module("rlcm_fast.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
