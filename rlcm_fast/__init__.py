"""Fine-tunes few-step text-to-image models with reinforcement learning; `rlcm_fast.fine_tune` does so from Python."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcm_fast.api import Run, fine_tune
    from rlcm_fast.permission import plug_in

__all__ = ["Run", "fine_tune", "plug_in"]

_PLACES = {"Run": "rlcm_fast.api", "fine_tune": "rlcm_fast.api", "plug_in": "rlcm_fast.permission"}


def __getattr__(name: str) -> object:
    """Imports what `__all__` names when it is first used, so that `import rlcm_fast` imports nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'rlcm_fast' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
