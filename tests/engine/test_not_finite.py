"""An update whose gradient is not finite moves nothing, under every engine; weights that are not finite are found."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from engine_cases import COMPILED, OURS, Large, distance
from tiny_policies import engine_of
from torch import Tensor

from rlcm_fast.config import EmaConfig
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.engine.base import Engine

pytestmark = pytest.mark.usefixtures("one_process")
ENGINES: dict[str, dict[str, Any]] = {
    "zero_0": {"stage": 0},
    "zero_0 adamw_8bit": {"stage": 0, "name": "adamw_8bit"},
    "zero_0 bitsandbytes": {"stage": 0, "name": "bnb_adamw_8bit"},
    **{f"zero_{stage} {dtype}": {"stage": stage, "dtype": dtype} for stage in (1, 2, 3) for dtype in ("fp32", "bf16")},
    "zero_1 adamw_8bit": {"stage": 1, "name": "adamw_8bit"},
    "pure_bf16": {"dtype": "pure_bf16", **OURS},
}
OFFLOADED = {f"zero_{stage} offload": {"stage": stage, "dtype": "bf16", "offload": True} for stage in (1, 2, 3)}
EVERY = [*ENGINES, *(pytest.param(name, marks=COMPILED) for name in OFFLOADED)]
FAULTS = ("loss", "gradient", "overflow")


def make(settings: dict[str, Any], num_micro_batches: int = 2, **more: Any) -> Engine:
    dtype = torch.float32 if settings.get("dtype", "fp32") == "fp32" else torch.bfloat16
    return engine_of(Large().to(dtype), num_micro_batches, **{"lr": 1e-3, "max_grad_norm": 0.5, **settings, **more})


def update(engine: Engine, settings: dict[str, Any], fault: str = "", num_micro_batches: int = 2) -> float:
    """The norm of one update; `fault` is in its last micro-batch but one."""
    dtype = torch.float32 if settings.get("dtype", "fp32") == "fp32" else torch.bfloat16
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    engine.begin_update(num_micro_batches)
    norm = None
    for number, rows in enumerate(x.chunk(num_micro_batches)):
        is_bad = number == max(0, num_micro_batches - 2)
        out = engine(rows).float()
        if is_bad and fault == "gradient":
            out.register_hook(lambda gradient: gradient.index_fill(1, torch.tensor([3]), math.inf))
        loss = (out - 1).square().mean() / num_micro_batches
        if is_bad and fault == "loss":  # a term without a gradient, as what a clip holds
            loss = loss + torch.tensor(math.nan)
        if is_bad and fault == "overflow":  # every element is finite, their squares are not
            loss = loss * 1e30
        engine.backward(loss)
        norm = engine.step()
    assert norm is not None
    return norm


@pytest.mark.parametrize("name", EVERY)
def test_a_skipped_update_leaves_weights_moments_and_random_numbers_alone(name: str):
    """The updates after it are bitwise those of an engine that never saw it; in the first update and later."""
    settings = {**ENGINES, **OFFLOADED}[name]
    engine, other = make(settings), make(settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lr_scheduler.step.*")
        for fault in FAULTS:
            before = engine.full_weights()
            assert not math.isfinite(update(engine, settings, fault)), fault
            assert distance(engine.full_weights(), before) == 0.0
            norms = [update(e, settings) for e in (engine, other)]
            assert norms[0] == norms[1] and math.isfinite(norms[0])
            assert distance(engine.full_weights(), other.full_weights()) == 0.0
            assert distance(engine.full_weights(), before) > 0.0


@pytest.mark.parametrize("name", EVERY)
def test_a_skipped_update_counts_for_the_learning_rate(name: str):
    settings = {**ENGINES, **OFFLOADED}[name]
    schedule = {"warmup_updates": 1, "final_lr_fraction": 0.5, "num_updates": 4, "lr": 1.0}
    engine = make(settings, **schedule)
    rates = []
    for fault in ("loss", "", "loss", ""):
        rates.append(engine.lr)
        update(engine, settings, fault)
    assert rates == pytest.approx([1 / 2, 7 / 8, 6 / 8, 5 / 8])


@pytest.mark.parametrize("fault", FAULTS[:2])
@pytest.mark.parametrize("dtype", ["fp32", "pure_bf16"])
def test_in_the_backward_pass_a_tensor_with_such_a_gradient_does_not_step(dtype: str, fault: str):
    settings = {"dtype": dtype, "in_backward": True, **OURS}
    engine = make(settings, 1)
    assert not engine.skips_whole_updates
    update(engine, settings, num_micro_batches=1)
    before = engine.full_weights()
    states = _moments(engine)
    if fault == "gradient":  # of one bias alone: the other three tensors step
        bias: Tensor = engine._network.second.bias  # type: ignore[attr-defined]
        bias.register_hook(lambda gradient: gradient * math.nan)
    assert not math.isfinite(update(engine, settings, fault if fault == "loss" else "", num_micro_batches=1))
    moved = {name for name, weight in engine.full_weights().items() if not torch.equal(weight, before[name])}
    expected = set() if fault == "loss" else {"first.weight", "first.bias", "second.weight"}
    assert moved == expected
    assert {name for name, state in _moments(engine).items() if not torch.equal(state, states[name])} == expected
    assert engine.weights_are_finite()


def _moments(engine: Any) -> dict[str, Tensor]:
    """The first moment of each weight."""
    states = engine._optimizer.state
    return {name: states[weight]["state1"].clone() for name, weight in engine._network.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1])
def test_the_average_leaves_out_skipped_updates(stage: int):
    settings = {"stage": stage}
    averages = []
    for faults in (("", "loss", "gradient", ""), ("", "")):
        network = Large()
        engine = AveragingEngine(engine_of(network, 2, stage=stage, lr=1e-3), network, EmaConfig(0.5))
        for fault in faults:
            update(engine, settings, fault)
        assert engine.average is not None
        averages.append(engine.average.weights())
    assert distance(*averages) == 0.0


@pytest.mark.parametrize("name", ["zero_0", "zero_2 bf16", "zero_3 bf16", "pure_bf16"])
def test_weights_that_are_not_finite_are_found(name: str):
    settings = ENGINES[name]
    engine: Any = make(settings)
    assert engine.weights_are_finite()
    module = engine._network if name == "pure_bf16" else engine._engine.module
    bias = module.second.bias
    held = bias.ds_tensor if settings.get("stage") == 3 else bias
    for bad in (math.nan, math.inf, -math.inf):
        with torch.no_grad():
            held[7] = bad
        assert not engine.weights_are_finite()


def test_an_average_that_is_not_finite_is_found():
    network = Large()
    engine = AveragingEngine(engine_of(network, 2), network, EmaConfig(0.5))
    assert engine.weights_are_finite() and engine.average is not None
    engine.average._ema.shadow_params[0].view(-1)[5] = math.nan
    assert not engine.weights_are_finite()
