"""A network whose moments have 8 bits, and how engines are compared on it."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

COMPILED = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler for DeepSpeedCPUAdam"),
)
OURS: dict[str, Any] = {"name": "adamw_8bit", "lr": 1e-3}


class Large(nn.Module):
    """Two weights of more than 4,096 elements, so that their moments have 8 bits, and two of fewer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(48, 100), nn.Linear(100, 48)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any weight."""
    return max((first[name] - second[name]).abs().max().item() for name in first)
