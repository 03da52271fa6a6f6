"""A plain Python function as a reward: it gets images and texts, and may return a list, an array or a tensor."""

# B images

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlcm_fast.trajectory import Prompt


class FunctionReward:
    """Scores images by a function of images (B, 3, H, W) float32 in [0, 1] and a list of B texts."""

    scope = "image"

    def __init__(
        self, function: Callable[..., Any], arguments: Mapping[str, Any] | None = None, name: str = "function"
    ) -> None:
        """arguments: further keyword arguments of each call; raises ValueError if the function does not accept them."""
        if arguments is not None:
            _check_accepts(function, arguments, name)
        self._function = functools.partial(function, **arguments) if arguments else function

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return as_scores(self._function(images, [prompt.text for prompt in prompts]))


def _check_accepts(function: Callable[..., Any], arguments: Mapping[str, Any], name: str) -> None:
    signature = inspect.signature(function)
    try:
        signature.bind("images", "texts", **arguments)
    except TypeError as error:
        raise ValueError(
            f"name={name} is a function that is called as {name.rpartition(':')[2]}(images, texts, **arguments), and"
            f" {error} with arguments={dict(arguments)}; it accepts {signature}"
        ) from error


def as_scores(scores: Any) -> Any:
    """Returns numbers as a float32 tensor; anything else as it is, for `check_scores` to word the mistake."""
    if isinstance(scores, Tensor):
        return scores.detach().float()
    if isinstance(scores, list | tuple) and all(isinstance(score, Tensor) for score in scores):
        return torch.stack([score.detach().float() for score in scores]) if scores else scores
    return torch.as_tensor(scores, dtype=torch.float32) if isinstance(scores, list | tuple | np.ndarray) else scores


def name_of(reward: object) -> str:
    """Returns a function's name, or that of an object's class."""
    if isinstance(reward, functools.partial):
        return name_of(reward.func)
    if inspect.isroutine(reward):
        return reward.__name__.strip("<>")
    return type(reward).__name__


def code_digest(reward: object) -> str | None:
    """Returns a hash of a function's code, or of what an object is called by; None if that is not Python code.

    It does not depend on names of files or on comments, nor on data that the function uses.
    """
    called = inspect.unwrap(reward) if inspect.isroutine(reward) else type(reward).__dict__.get("__call__")
    called = called.__func__ if inspect.ismethod(called) else called
    if not inspect.isfunction(called):
        return None
    digest = hashlib.sha256()
    _add_code(digest, called.__code__)
    return digest.hexdigest()[:12]


def _add_code(digest: Any, code: CodeType) -> None:
    digest.update(code.co_code + repr(code.co_names).encode())
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            _add_code(digest, constant)
        else:
            digest.update(repr(constant).encode())
