"""The engine against plain torch, and its ZeRO stages against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_policies import TinyNetwork, engine_of, policy_of, trajectory_of
from torch import Tensor

from rlcm_fast.backbones.acceleration import accelerate
from rlcm_fast.config import EngineConfig
from rlcm_fast.engine.base import Engine

pytestmark = pytest.mark.usefixtures("one_process")
STAGES = (0, 1, 2, 3)


def train(engine: Engine, num_updates: int = 3, dtype: torch.dtype = torch.float32) -> list[float]:
    """The gradient norms of updates of two micro-batches each."""
    policy = policy_of(engine, dtype=dtype)
    trajectory = trajectory_of(policy_of(TinyNetwork(5)), 4)
    norms = []
    for _ in range(num_updates):
        for rows in torch.arange(8).split(4):
            t = trajectory.transitions(rows)
            engine.backward(policy.network_output(t.x_t, t.step, t.conditioning).square().mean() / 2)
            norms.append(engine.step())
    assert norms[0::2] == [None] * num_updates
    return [norm for norm in norms[1::2] if norm is not None]


def train_plain(max_grad_norm: float, num_updates: int = 3) -> tuple[dict[str, Tensor], list[float]]:
    """The same in torch alone, the micro-batches as one batch."""
    network = TinyNetwork()
    policy, optimizer = policy_of(network), torch.optim.AdamW(network.parameters(), lr=1e-2, weight_decay=0.0)
    t = trajectory_of(policy_of(TinyNetwork(5)), 4).transitions(torch.arange(8))
    norms = []
    for _ in range(num_updates):
        optimizer.zero_grad()
        policy.network_output(t.x_t, t.step, t.conditioning).square().mean().backward()
        norms.append(torch.nn.utils.clip_grad_norm_(network.parameters(), max_grad_norm or float("inf")).item())
        optimizer.step()
    return network.state_dict(), norms


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Largest difference of any weight."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.01])
def test_all_zero_stages_give_the_weights_and_gradient_norms_of_plain_torch(max_grad_norm: float):
    weights, norms = train_plain(max_grad_norm)
    assert min(norms) > 0.02, "clipping would not act"
    for stage in STAGES:
        engine = engine_of(TinyNetwork(), num_micro_batches=2, stage=stage, max_grad_norm=max_grad_norm)
        assert train(engine) == pytest.approx(norms, rel=1e-5), f"stage {stage}"
        trained = engine.full_weights()
        assert distance(trained, weights) < 1e-6, f"stage {stage}"
        assert distance(trained, TinyNetwork().state_dict()) > 1e-2


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_follows_fp32(stage: int):
    weights, norms = train_plain(0.0)
    engine = engine_of(TinyNetwork().to(torch.bfloat16), num_micro_batches=2, stage=stage, dtype="bf16")
    assert train(engine, dtype=torch.bfloat16) == pytest.approx(norms, rel=0.03)
    trained = engine.full_weights()
    assert {value.dtype for value in trained.values()} == {torch.float32}
    assert distance(trained, weights) < 5e-3  # three steps of at most 1e-2, weights of three digits


def test_the_learning_rate_warms_up_and_falls_to_its_last_fraction():
    engine = engine_of(TinyNetwork(), 2, lr=1.0, warmup_updates=1, final_lr_fraction=0.5, num_updates=4)
    rates = [engine.lr]
    for _ in range(4):
        train(engine, num_updates=1)
        rates.append(engine.lr)
    assert rates == pytest.approx([1 / 2, 7 / 8, 6 / 8, 5 / 8, 4 / 8])


@pytest.mark.parametrize("stage", STAGES)
def test_a_loaded_engine_goes_on_bitwise(stage: int, tmp_path: Path):
    settings = {"stage": stage, "max_grad_norm": 0.1, "warmup_updates": 3}
    engine = engine_of(TinyNetwork(), 2, **settings)
    train(engine, num_updates=2)
    engine.save(tmp_path)
    train(engine, num_updates=1)
    other = engine_of(TinyNetwork(seed=9), 2, **settings)
    other.load(tmp_path)
    train(other, num_updates=1)
    assert distance(engine.full_weights(), other.full_weights()) == 0.0
    assert engine.lr == other.lr


@pytest.mark.parametrize(
    ("stage", "dtype"), [*((stage, torch.float32) for stage in STAGES), (0, torch.bfloat16)], ids=str
)
def test_a_loaded_engine_has_the_settings_of_its_config(stage: int, dtype: torch.dtype, tmp_path: Path):
    name = {torch.float32: "fp32", torch.bfloat16: "pure_bf16"}[dtype]
    settings = {"stage": stage, "dtype": name, "name": "adamw" if name == "fp32" else "adamw_8bit"}
    engine = engine_of(TinyNetwork().to(dtype), 2, **settings, final_lr_fraction=0.0, num_updates=4)
    train(engine, num_updates=2, dtype=dtype)
    engine.save(tmp_path)
    changed = {"lr": 1e-3, "betas": [0.8, 0.9], "eps": 1e-5, "weight_decay": 0.1}
    other = engine_of(TinyNetwork().to(dtype), 2, **settings, **changed, final_lr_fraction=0.0, num_updates=8)
    other.load(tmp_path)
    assert other.lr == pytest.approx(1e-3 * 6 / 8)
    train(other, num_updates=1, dtype=dtype)
    assert other.lr == pytest.approx(1e-3 * 5 / 8)
    (group,) = other._optimizer.param_groups  # type: ignore[attr-defined]
    assert (tuple(group["betas"]), group["eps"], group["weight_decay"]) == ((0.8, 0.9), 1e-5, 0.1)


def test_a_folder_without_an_engines_files_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="holds no state of an engine: it has no engine/; give another checkpoint"):
        engine_of(TinyNetwork(), 1).load(tmp_path)


def test_stage_3_leaves_the_linear_of_torch_alone():
    """DeepSpeed's own default replaces it in the whole process, which then rounds differently in every later run."""
    before = torch.nn.functional.linear
    engine_of(TinyNetwork(), 1, stage=3)
    assert torch.nn.functional.linear is before


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_convolutions_in_channels_last_train_as_others_under_zero(stage: int):
    """ZeRO flattens weights, so only what goes through the convolutions is in channels_last."""
    weights = []
    for channels_last in (False, True):
        network = TinyNetwork()
        accelerate(network, EngineConfig(stage, channels_last=channels_last))  # type: ignore[arg-type]
        engine = engine_of(network, 2, stage=stage, max_grad_norm=0.01, channels_last=channels_last)
        inputs: list[Tensor] = []
        network.of_state.register_forward_hook(lambda _, given, __, inputs=inputs: inputs.append(given[0]))
        train(engine)
        weights.append(engine.full_weights())
        assert all(x.is_contiguous(memory_format=torch.channels_last) == channels_last for x in inputs) and inputs
    assert distance(*weights) < 1e-6


def test_channels_last_weights_train_as_others_and_stay_so():
    """DeepSpeed sends start weights as bytes, which torch refuses to see in channels_last ones."""
    plain, engines = {}, {}
    for channels_last in (False, True):
        network = TinyNetwork()
        engine = engine_of(network, num_micro_batches=2, stage=0, max_grad_norm=0.01, channels_last=channels_last)
        train(engine)
        plain[channels_last], engines[channels_last] = engine.full_weights(), network
    assert distance(plain[True], plain[False]) < 1e-6
    weights = [weight for weight in engines[True].parameters() if weight.ndim == 4]
    assert weights and all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


def test_one_process_copies_no_gradients_to_send_them_to_nobody():
    network = TinyNetwork()
    engine = engine_of(network, num_micro_batches=1, stage=0, max_grad_norm=1.0)
    policy, trajectory = policy_of(engine), trajectory_of(policy_of(TinyNetwork(5)), 4)
    t = trajectory.transitions(torch.arange(8))
    loss = policy.network_output(t.x_t, t.step, t.conditioning).square().mean()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        engine.backward(loss)
    assert not {event.key for event in seen.key_averages()} & {"aten::cat", "c10d::allreduce_"}


def test_deepspeed_does_not_wait_for_the_device_to_time_passes():
    engine = engine_of(TinyNetwork(), 2)
    assert not engine._engine.tput_timer.config.enabled  # type: ignore[attr-defined]


def test_more_weights_than_bitsandbytes_counts_are_refused_before_it_is_called():
    with torch.device("meta"):
        network = torch.nn.Linear(2**16, 2**15, bias=False)
    message = (
        "optimizer.name=bnb_adamw_8bit allows fewer than 2.31 weights .* there are 2,147,483,648; set optimizer.name"
    )
    with pytest.raises(ValueError, match=message):
        engine_of(network, 1, stage=1, name="bnb_adamw_8bit")
