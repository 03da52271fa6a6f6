"""Optimizers under ZeRO, weights without a master copy, the optimizer within the backward pass, recomputation."""

from __future__ import annotations

import copy
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from engine_cases import COMPILED, OURS, Large, distance
from tiny_policies import TinyNetwork, engine_of
from torch import Tensor, nn

from rlcm_fast.build import build_engine
from rlcm_fast.config import Config, EngineConfig, OptimizerConfig
from rlcm_fast.config.resolved import resolve
from rlcm_fast.engine.base import Engine
from rlcm_fast.engine.direct import DirectEngine
from rlcm_fast.engine.recomputation import set_recomputation

pytestmark = pytest.mark.usefixtures("one_process")


def train(engine: Engine, num_updates: int, num_micro_batches: int = 2, dtype: torch.dtype = torch.float32) -> list:
    """Norms of the updates, each on 8 rows towards 1."""
    x = torch.randn(8, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    norms = []
    for _ in range(num_updates):
        engine.begin_update(num_micro_batches)
        for rows in x.chunk(num_micro_batches):
            engine.backward((engine(rows).float() - 1).square().mean() / num_micro_batches)
            norms.append(engine.step())
    return [norm for norm in norms if norm is not None]


def length(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Of the way from one to the other."""
    return torch.cat([(first[name] - second[name]).flatten() for name in first]).norm().item()


@pytest.mark.parametrize("offload", [False, pytest.param(True, marks=COMPILED)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_updates_may_have_more_or_fewer_micro_batches_than_the_one_before(stage: int, offload: bool):
    """As where transitions have no signal; DeepSpeed is told where an update ends."""
    ends = []
    for settings in ({}, {"stage": stage, "offload": offload}):
        engine = engine_of(Large(), 4, lr=1e-3, eps=1e-3, max_grad_norm=0.1, **settings)
        norms = [norm for count in (4, 1, 2, 1, 4) for norm in train(engine, 1, count)]
        ends.append((norms, engine.full_weights(), engine.lr))
    (expected, weights, lr), (norms, sharded, lr_of_stage) = ends
    assert norms == pytest.approx(expected, rel=1e-4) and lr == lr_of_stage
    assert 0.1 < expected[-1] < expected[0], "clipped, and learning"
    assert distance(weights, sharded) < 1e-6


@pytest.mark.parametrize("name", ["adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit"])
def test_8_bit_optimizers_are_the_same_at_stages_0_to_2_and_near_float32_adamw(name: str):
    """Stage 1 and 2 flatten the weights, so other elements share a block: alike to the quantisation error."""
    truth = engine_of(Large(), 2, lr=1e-3)
    norms = train(truth, 4)
    start = Large().state_dict()
    way = length(truth.full_weights(), start)
    trained = {}
    for stage in (0, 1, 2):
        engine = engine_of(Large(), 2, stage=stage, name=name, lr=1e-3)
        assert train(engine, 4) == pytest.approx(norms, rel=0.01)
        trained[stage] = engine.full_weights()
        assert length(trained[stage], truth.full_weights()) < 0.1 * way
    assert distance(trained[1], trained[2]) < 1e-6


def test_the_first_update_of_8_bit_states_under_zero_has_the_bias_correction_of_the_first():
    """A dummy step at the start would make it sqrt(2) times too short or so."""
    for stage in (0, 1, 2):
        engine = engine_of(Large(), 1, stage=stage, name="adamw_8bit", lr=1e-3)
        train(engine, 1, num_micro_batches=1)
        moved = engine.full_weights()["first.weight"] - Large().state_dict()["first.weight"]
        assert moved.abs().median().item() == pytest.approx(1e-3, rel=1e-3)


def test_pure_bf16_follows_float32_and_counts_lost_updates():
    truth, engine = engine_of(Large(), 2, lr=1e-3), engine_of(Large().bfloat16(), 2, dtype="pure_bf16", **OURS)
    norms = train(truth, 10)
    assert train(engine, 10, dtype=torch.bfloat16) == pytest.approx(norms, rel=0.05)
    start = Large().state_dict()
    assert length(engine.full_weights(), truth.full_weights()) < 0.2 * length(truth.full_weights(), start)
    share = engine.metrics()["lost_updates"]
    assert 0.0 < share < 0.9  # steps of 1e-3 on weights of 0.1, whose last digit is 5e-4
    assert engine.metrics()["lost_updates"] == 0.0  # since it was last asked


def test_the_seed_of_the_run_is_that_of_the_rounding():
    ends = []
    for seed in (1, 1, 2):
        engine = engine_of(Large().bfloat16(), 1, dtype="pure_bf16", seed=seed, **OURS)
        train(engine, 1, 1, torch.bfloat16)
        ends.append(engine.full_weights())
    assert distance(ends[0], ends[1]) == 0.0
    last_digits = (ends[0]["first.weight"] != ends[2]["first.weight"]).float().mean().item()
    assert 0.1 < last_digits < 0.9  # steps of 1e-3 on weights of 0.1, whose last digit is 5e-4


def test_a_config_gives_its_seed_to_the_rounding(tiny_lcm_folder: str):
    optimizer = OptimizerConfig(name="adamw_8bit")
    config = Config(engine=EngineConfig(0, "pure_bf16"), optimizer=optimizer, seed=5)
    unet = UNet2DConditionModel.from_pretrained(tiny_lcm_folder, subfolder="unet")
    engine = build_engine(unet, resolve(config, 1)).engine
    assert isinstance(engine, DirectEngine)
    assert engine._optimizer.seed == 5


@pytest.mark.parametrize("dtype", ["fp32", "pure_bf16"])
def test_the_optimizer_in_the_backward_pass_ends_where_the_ordinary_one_does(dtype: str):
    """The same weights bit for bit as long as no norm is clipped."""
    of = {"fp32": torch.float32, "pure_bf16": torch.bfloat16}[dtype]
    engines = [engine_of(Large().to(of), 1, dtype=dtype, in_backward=i, max_grad_norm=100.0, **OURS) for i in (0, 1)]
    norms = [train(engine, 3, num_micro_batches=1, dtype=of) for engine in engines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3 if dtype == "fp32" else 1e-2)
    assert distance(*(engine.full_weights() for engine in engines)) == 0.0
    assert distance(engines[1].full_weights(), Large().to(of).state_dict()) > 1e-3


def test_gradients_never_all_exist_at_once_in_the_backward_pass():
    network = Large()
    engine = engine_of(network, 1, in_backward=True, **OURS)
    alive: list[int] = []
    seen: list[weakref.ref] = []

    def note(weight: Tensor) -> None:
        seen.append(weakref.ref(weight.grad))  # type: ignore[arg-type]
        alive.append(sum(reference() is not None for reference in seen))

    for weight in network.parameters():
        hooks = weight._post_accumulate_grad_hooks  # ours runs before the engine's
        assert hooks is not None
        stepping = list(hooks.values())
        hooks.clear()
        weight.register_post_accumulate_grad_hook(note)
        for hook in stepping:
            weight.register_post_accumulate_grad_hook(hook)
    train(engine, 1, num_micro_batches=1)
    assert len(alive) == 4 and max(alive) <= 2  # a layer's weight and bias come together
    assert all(weight.grad is None for weight in network.parameters())


def test_clipping_in_the_backward_pass_is_by_the_tensor():
    network = Large()
    engine = engine_of(network, 1, in_backward=True, max_grad_norm=1e-3, eps=1.0, **OURS)
    before = copy.deepcopy(network.state_dict())
    (norm,) = train(engine, 1, num_micro_batches=1)
    assert norm > 0.1
    # with eps = 1 a first step is lr g, so its length is lr max_grad_norm
    for name, value in network.state_dict().items():
        assert (value - before[name]).norm().item() == pytest.approx(1e-6, rel=0.02)


@pytest.mark.parametrize("in_backward", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "pure_bf16"])
def test_a_loaded_engine_goes_on_bitwise(dtype: str, in_backward: bool, tmp_path: Path):
    of = {"fp32": torch.float32, "pure_bf16": torch.bfloat16}[dtype]
    settings = {"dtype": dtype, "in_backward": in_backward, "warmup_updates": 3, "max_grad_norm": 0.1, "seed": 7} | OURS
    engine = engine_of(Large().to(of), 1, **settings)
    train(engine, 2, 1, of)
    engine.save(tmp_path)
    train(engine, 1, 1, of)
    other = engine_of(TinyLike().to(of), 1, **settings)
    other.load(tmp_path)
    train(other, 1, 1, of)
    assert distance(engine.full_weights(), other.full_weights()) == 0.0
    assert engine.lr == other.lr


class TinyLike(Large):
    """Other weights of the same shapes."""

    def __init__(self) -> None:
        super().__init__()
        for weight in self.parameters():
            nn.init.normal_(weight)


def test_a_checkpoint_of_other_engine_settings_is_refused(tmp_path: Path):
    engine = engine_of(TinyNetwork().bfloat16(), 1, dtype="pure_bf16", **OURS)
    with pytest.raises(ValueError, match=r"holds no state of an engine: it has no engine/; give another checkpoint"):
        engine.load(tmp_path)


def test_channels_last_weights_stay_so():
    network = nn.Sequential(nn.Conv2d(4, 130, 3), nn.Conv2d(130, 4, 3))
    network = network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    engine = engine_of(network.bfloat16(), 1, dtype="pure_bf16", **OURS)
    engine.backward(engine(torch.randn(2, 4, 8, 8).bfloat16()).float().square().mean())
    engine.step()
    for weight in network.parameters():
        assert weight.ndim == 1 or weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["none", "block", "selective"])
def test_recomputation_changes_no_gradient_and_keeps_less(kind: str, tiny_lcm_folder: str):
    unet = UNet2DConditionModel.from_pretrained(tiny_lcm_folder, subfolder="unet").eval()
    expected, everything = _gradients_and_kept(unet)
    set_recomputation(unet, kind)
    gradients, kept = _gradients_and_kept(unet)
    assert all(torch.equal(a, b) for a, b in zip(expected, gradients, strict=True))
    share = kept / everything
    assert share == 1 if kind == "none" else share < {"block": 0.4, "selective": 0.7}[kind]


def _gradients_and_kept(unet: nn.Module) -> tuple[list[Tensor], int]:
    """Gradients of all weights, and the bytes that the forward pass keeps besides them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    text, guidance = torch.randn(2, 5, 24, generator=generator), torch.randn(2, 16, generator=generator)
    weights = {weight.untyped_storage().data_ptr() for weight in unet.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = unet(x, torch.tensor([5, 900]), text, timestep_cond=guidance, return_dict=False)[0]
    gradients = torch.autograd.grad(out.square().sum(), list(unet.parameters()))
    return list(gradients), sum(kept.values())


@pytest.mark.parametrize("stage", [pytest.param(stage, marks=COMPILED) for stage in (1, 2, 3)])
def test_states_on_the_cpu_train_as_those_on_the_device(stage: int):
    """DeepSpeedCPUAdam is compiled at its first use, which takes most of a minute."""
    engines = [engine_of(Large(), 2, stage=stage, lr=1e-3, offload=offload) for offload in (False, True)]
    norms = [train(engine, 3) for engine in engines]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert distance(*(engine.full_weights() for engine in engines)) < 1e-6
