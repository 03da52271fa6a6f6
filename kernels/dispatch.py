"""Which implementation runs: torch (reference.py) or triton (triton_ops/).

    with dispatch.use("torch"): ...      for a block
    dispatch.set_default("triton")       from now on; the trainer does it with engine.kernels
    RLCM_FAST_KERNELS=torch              where that is auto, the default; read once, at import

`auto` takes Triton for CUDA tensors and torch elsewhere. An explicit choice that cannot run is an error
that says what is missing, never another implementation. The choice is one for the process, all threads alike, and is
plain data, so that torch.compile traces through it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

CHOICES = ("auto", "torch", "triton")
ENVIRONMENT = "RLCM_FAST_KERNELS"

_has_triton = find_spec("triton") is not None
_interprets = os.environ.get("TRITON_INTERPRET") == "1"


@contextmanager
def use(choice: str) -> Iterator[None]:
    """Takes `choice` (auto, torch or triton) within the block; ValueError if it is none of them."""
    before = _choice
    set_default(choice)
    try:
        yield
    finally:
        set_default(before)


def set_default(choice: str) -> None:
    """Takes `choice` from now on; ValueError if it is none of auto, torch and triton."""
    global _choice
    _choice = _known(choice)


def is_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors is Triton's.

    Raises:
        ValueError: Triton was chosen explicitly, and is not installed, or cannot run on such tensors.
    """
    choice = _environment if _choice == "auto" else _choice
    if choice == "torch":
        return False
    given = [tensor for tensor in tensors if tensor is not None]
    problem = _problem(given)
    if choice == "triton" and problem:
        raise ValueError(f"kernels=triton {problem}; or choose kernels=auto or torch")
    return problem is None and (choice == "triton" or given[0].is_cuda)


def _problem(tensors: list[Tensor]) -> str | None:
    """Why Triton cannot run on these tensors; None if it can."""
    if not _has_triton:
        return "needs the package triton, which is not installed: pip install triton"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "computes in float32 and takes no float64: pass float32"
    if not tensors[0].is_cuda and not _interprets:
        return f"cannot run on {tensors[0].device.type}: start with TRITON_INTERPRET=1 (slow, for tests) or use a GPU"
    return None


def _known(choice: str, name: str = "kernels") -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name}={choice} is unknown; use one of {', '.join(CHOICES)}")
    return choice


_choice = "auto"
_environment = _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)
