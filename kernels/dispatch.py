"""Choose the implementation that runs: torch (reference.py) or triton (triton_ops/).

    with dispatch.use("torch"): ...      chooses for a block
    dispatch.set_default("triton")       chooses from now on; a run does so with engine.kernels
    RLCM_FAST_KERNELS=torch              chooses if the choice is auto, the default; read once, at import

`auto` runs Triton on CUDA tensors (float64 excepted) and torch elsewhere. An explicit choice that cannot run raises an
error that names what is missing; nothing falls back to the other implementation. All threads of a process share the
choice. It is plain data, so torch.compile traces through it.
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
    """Use `choice` (auto, torch or triton) within the block; raises ValueError for any other word."""
    before = _choice
    set_default(choice)
    try:
        yield
    finally:
        set_default(before)


def set_default(choice: str) -> None:
    """Use `choice` (auto, torch or triton) from now on; raises ValueError for any other word."""
    global _choice
    _choice = _known(choice)


def is_triton(*tensors: Tensor | None) -> bool:
    """Whether an operation on these tensors runs in Triton.

    Raises:
        ValueError: you chose Triton explicitly, but it is not installed or cannot run on such tensors.
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
    """The reason why Triton cannot run on these tensors; None if it can."""
    if not _has_triton:
        return "needs the package triton, which is not installed: pip install triton"
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        return "computes in float32 and does not accept float64: pass float32"
    if not tensors[0].is_cuda and not _interprets:
        return f"cannot run on {tensors[0].device.type}: start with TRITON_INTERPRET=1 (slow, for tests) or use a GPU"
    return None


def _known(choice: str, name: str = "kernels") -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name}={choice} is unknown; use one of {', '.join(CHOICES)}")
    return choice


_choice = "auto"
_environment = _known(os.environ.get(ENVIRONMENT) or "auto", ENVIRONMENT)
