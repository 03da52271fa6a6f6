"""Small engines of every kind, to be saved and loaded in one process."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from tiny_policies import engine_of
from torch import Tensor, nn

from rlcm_fast.engine import zero
from rlcm_fast.engine.base import Engine

ENGINES: dict[str, dict[str, Any]] = {
    **{f"stage_{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"bf16_{stage}": {"stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)},
    "bf16_sums_in_fp32": {"stage": 1, "dtype": "bf16", "sums": "fp32"},
    "adam": {"name": "adam"},
    **{f"8bit_{stage}": {"stage": stage, "name": "adamw_8bit"} for stage in (0, 1, 2)},
    **{f"bnb_{stage}": {"stage": stage, "name": "bnb_adamw_8bit"} for stage in (0, 1, 2)},
    "bnb_paged": {"stage": 1, "name": "bnb_paged_adamw_8bit"},
    "8bit_channels_last": {"name": "adamw_8bit", "channels_last": True},
    "pure_bf16": {"dtype": "pure_bf16", "name": "adamw_8bit"},
    "in_backward": {"name": "adamw_8bit", "in_backward": True},
}
QUICK = ("stage_0", "stage_3", "bf16_sums_in_fp32", "8bit_1", "bnb_0", "pure_bf16", "in_backward")
EVERY = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]


class Convolutions(nn.Module):
    """A convolution of more than 4,096 weights, so that its moments have 8 bits, a smaller layer and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Conv2d(4, 130, 3), nn.Linear(130, 3)
        self.register_buffer("shift", torch.full((3,), float(seed)))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)).mean((2, 3))) + self.shift


def build(seed: int, **settings: Any) -> Engine:
    """settings: of `engine_of`, and sums: the dtype in which DeepSpeed adds up gradients."""
    settings = {"num_updates": 5, "warmup_updates": 1, "final_lr_fraction": 0.1, "weight_decay": 0.01, **settings}
    sums, config_of = settings.pop("sums", None), zero._deepspeed_config

    def with_sums(*arguments: Any) -> dict[str, Any]:
        return {**config_of(*arguments), **({"data_types": {"grad_accum_dtype": sums}} if sums else {})}

    dtype = torch.float32 if settings.get("dtype", "fp32") == "fp32" else torch.bfloat16
    with patch.object(zero, "_deepspeed_config", with_sums):
        return engine_of(Convolutions(seed).to(dtype), 1, **settings)


def update(engine: Any, num_updates: int) -> None:
    module = engine._engine.module if isinstance(engine, zero.ZeroEngine) else engine._network
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)).to(module.second.bias.dtype)
    for _ in range(num_updates):
        engine.backward((engine(x).float() - 1).square().mean())
        engine.step()


def assert_equal_weights(first: Engine, second: Engine) -> None:
    weights, expected = first.full_weights(), second.full_weights()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
