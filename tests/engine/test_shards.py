"""Engines that are saved and loaded in one process: bitwise, at any stage, in their own dtypes, without pickles."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from resized_runs import full_states
from safetensors.torch import load_file
from saved_engines import ENGINES, EVERY, assert_equal_weights, build, update
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlcm_fast.engine.base import Engine
from rlcm_fast.engine.shards import Part, Saved, Shard, check_same_weights
from rlcm_fast.kernels.adamw import AdamW8bit

pytestmark = pytest.mark.usefixtures("one_process")
COMPILED = (
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler for DeepSpeedCPUAdam"),
)


def assert_goes_on(settings: dict[str, Any], folder: Path, num_updates: int) -> None:
    """Saved after `num_updates`, loaded into other weights, and both one update further."""
    engine, other = build(0, **settings), build(9, **settings)
    update(engine, num_updates)
    engine.save(folder)
    assert not [file for file in folder.rglob("*") if file.is_file() and file.suffix not in (".json", ".safetensors")]
    other.load(folder)
    assert other.lr == engine.lr
    assert_equal_weights(other, engine)
    update(engine, 2)
    update(other, 2)
    assert other.lr == engine.lr
    assert_equal_weights(other, engine)


def assert_equal_states(first: Engine, second: Engine) -> None:
    """Weights, master weights, moments, step counts and the schedule."""
    states, expected = full_states(first), full_states(second)
    assert states.keys() == expected.keys() and len(states) > 10
    for name, value in expected.items():
        if isinstance(value, Tensor):
            assert torch.equal(states[name], value), name
        elif name != "weights":
            assert states[name] == value, name
    assert_equal_weights(first, second)


@pytest.mark.parametrize("name", EVERY)
def test_a_loaded_engine_goes_on_bitwise_and_nothing_of_it_is_pickled(name: str, tmp_path: Path):
    assert_goes_on(ENGINES[name], tmp_path, 2)


@pytest.mark.parametrize("name", ["stage_0", "bf16_1", "stage_3", "8bit_1", "bnb_0", "pure_bf16"])
def test_so_does_one_that_was_saved_before_its_first_update(name: str, tmp_path: Path):
    assert_goes_on(ENGINES[name], tmp_path, 0)


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=COMPILED) for stage in (1, 2, 3)])
def test_states_in_cpu_memory_are_restored_bitwise_and_go_on_to_the_last_digit(stage: int, tmp_path: Path):
    """The state of DeepSpeedCPUAdam is restored bitwise, and its next update may differ in the last digit."""
    engine, other = (build(seed, stage=stage, offload=True) for seed in (0, 9))
    update(engine, 2)
    engine.save(tmp_path)
    other.load(tmp_path)
    assert_equal_states(other, engine)
    update(engine, 1)
    update(other, 1)
    weights, expected = engine.full_weights(), other.full_weights()
    assert all((weights[name] - expected[name]).abs().max() < 1e-6 for name in expected)  # an update moves by 1e-2


@pytest.mark.parametrize(("saved", "loaded"), list(itertools.permutations((0, 1, 2, 3), 2)))
def test_every_stage_of_zero_loads_the_others_weights_moments_and_schedule(saved: int, loaded: int, tmp_path: Path):
    engine, other = build(0, stage=saved), build(9, stage=loaded)
    update(engine, 2)
    engine.save(tmp_path)
    other.load(tmp_path)
    assert_equal_states(other, engine)


def test_a_bf16_engine_keeps_its_master_weights_once_and_no_rounded_ones(tmp_path: Path):
    engine = build(0, stage=1, dtype="bf16")
    update(engine, 2)
    engine.save(tmp_path)
    weights = load_file(tmp_path / "engine" / "weights_00000_of_00001.safetensors")
    trained = {name: weight for name, weight in weights.items() if name != "shift"}
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    assert any(not torch.equal(weight, weight.bfloat16().float()) for weight in trained.values())


@pytest.mark.parametrize(
    ("saved", "loaded", "said"),
    [
        ("stage_0", "8bit_0", r"keeps other states \(exp_avg, exp_avg_sq\) than this run's optimizer.name \(absmax1, "),
        (
            "8bit_0",
            "stage_0",
            r"keeps other states \(absmax1, absmax2, state1, state2\) than this run's",
        ),
        ("8bit_1", "stage_1", r"keeps other states \(absmax1, .* than this run's optimizer.name \(exp_avg, exp_avg_sq"),
        ("stage_1", "bnb_1", "keeps other states"),
        ("8bit_1", "8bit_0", "8-bit states of flat groups, which only engine.zero_stage 1 and 2 have; keep the stage"),
        ("8bit_0", "8bit_1", "states of each weight .absmax1, .* that ZeRO cannot join; keep engine.zero_stage"),
    ],
)
def test_states_of_another_optimizer_are_refused_in_one_line(saved: str, loaded: str, said: str, tmp_path: Path):
    engine, other = build(0, **ENGINES[saved]), build(9, **ENGINES[loaded])
    update(engine, 1)
    engine.save(tmp_path)
    with pytest.raises(ValueError, match=said) as caught:
        other.load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("present", [{"a": (2, 3), "c": (4,)}, {"a": (3, 2), "b": (4,)}, {"b": (4,)}])
def test_other_weights_are_refused_by_name_and_by_shape(present: dict[str, tuple[int, ...]]):
    saved = {"a": (2, 3), "b": (4,)}
    check_same_weights(saved, {"a": torch.Size((2, 3)), "b": [4]})
    with pytest.raises(ValueError, match=r"do not train the same weights \([ab], for example\); keep the model"):
        check_same_weights(saved, present)


def test_a_weight_of_which_a_shard_is_missing_is_refused():
    part = Part("a", (2, 3), 0, torch.zeros(4), {}, None)
    with pytest.raises(ValueError, match="4 of the 6 elements of a are there"):
        Saved([Shard([part], {})])


def test_a_checkpoint_of_which_a_shard_is_missing_is_refused(tmp_path: Path):
    build(0).save(tmp_path)
    for file in (tmp_path / "engine").iterdir():
        file.rename(file.with_name(file.name.replace("_of_00001", "_of_00002")))
    with pytest.raises(ValueError, match="lacks shards: engine/ has 1 of them; give another checkpoint"):
        build(0).load(tmp_path)


class Made(TorchDispatchMode):
    """Notes (dtype, elements) of every tensor that torch makes in new memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[tuple[torch.dtype, int]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.tensors.add((tensor.dtype, tensor.numel()))
        return made


@pytest.mark.parametrize("name", ["8bit_0", "8bit_1", "bnb_0", "bnb_1", "pure_bf16", "8bit_channels_last"])
def test_8_bit_states_are_restored_without_a_copy_in_another_dtype(name: str, tmp_path: Path):
    engine, other = build(0, **ENGINES[name]), build(9, **ENGINES[name])
    update(engine, 1)
    engine.save(tmp_path)
    with Made() as made:
        other.load(tmp_path)
    large = {(dtype, numel) for dtype, numel in made.tensors if numel >= 4096}
    assert large and {dtype for dtype, _ in large} == {torch.uint8}


def test_torchs_own_way_would_make_one():
    """Which is what AdamW8bit.load_state_dict did before it cast the states back."""
    weight = nn.Parameter(torch.zeros(5000))
    optimizer = AdamW8bit([weight])
    weight.grad = torch.ones(5000)
    optimizer.step()
    state = optimizer.state_dict()
    for load, dtypes in ((torch.optim.Optimizer.load_state_dict, {torch.float32}), (AdamW8bit.load_state_dict, set())):
        with Made() as made:
            load(optimizer, state)
        assert {dtype for dtype, numel in made.tensors if numel == 5000} - {torch.uint8} == dtypes
