"""The planner's bytes against those of real runs on the CPU, of real optimizers, and against known figures."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlcm_fast.backbones.loading import SHIPPED
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, EngineConfig, OptimizerConfig, PolicyConfig, UpdateConfig
from rlcm_fast.kernels.adamw import AdamW8bit
from rlcm_fast.memory import estimate
from rlcm_fast.memory.architecture import load_architecture
from rlcm_fast.memory.engine import Engine
from rlcm_fast.memory.estimate import Strategy, Workload, estimate_memory, measure, moment_bytes, strategy_of
from rlcm_fast.memory.tracing import Setup, prepare_unet, profile_unet, trace_unet
from rlcm_fast.policies import GaussianPolicy, build_policy
from rlcm_fast.trajectory import Prompt, Transitions

ARCHITECTURE = load_architecture(str(SHIPPED["shapes/lcm"]))
WORK = Workload(
    num_processes=1, samples=8, num_steps=3, num_actions=2, num_passes=1, transitions_per_update=16, num_updates=1
)
WITHIN = 0.02  # what the planner promises


def close(real: float) -> Any:
    return pytest.approx(real, rel=WITHIN)


def real_run(recompute: str, micro_batch_size: int) -> tuple[GaussianPolicy, nn.Module, Transitions]:
    """The shipped model as the trainer has it, and a micro-batch of its own transitions."""
    backbone = Backbone.load("shapes/lcm", None, torch.device("cpu"), torch.float32)
    if recompute == "block":
        backbone.unet.enable_gradient_checkpointing()
    config = PolicyConfig(num_steps=3)
    parts = (backbone.unet.config, backbone.scheduler_config, torch.float32, torch.device("cpu"))
    policy = build_policy(config, backbone.unet, *parts)
    conditioning = backbone.encode([Prompt("a red circle")] * WORK.samples, with_negative=False)
    trajectory, _ = policy.sample(conditioning, torch.Generator().manual_seed(0))
    return policy, backbone.unet, trajectory.transitions(torch.arange(micro_batch_size))


def saved_bytes(policy: GaussianPolicy, unet: nn.Module, transitions: Transitions) -> tuple[int, Tensor]:
    """Of the distinct storages that the forward saves for the backward, weights excluded."""
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor)  # so that no address is used twice
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = policy.log_prob(transitions).mean()
    for parameter in unet.parameters():
        sizes.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(sizes.values()), loss


@pytest.mark.parametrize("recompute", ["none", "block"])
@pytest.mark.parametrize("micro_batch_size", [3, 16])
def test_bytes_are_those_of_a_real_update(recompute: Any, micro_batch_size: int):
    policy, unet, transitions = real_run(recompute, micro_batch_size)
    saved, loss = saved_bytes(policy, unet, transitions)
    loss.backward()
    optimizer = torch.optim.AdamW(unet.parameters())
    optimizer.step()
    states = sum(value.nbytes for state in optimizer.state.values() for value in state.values())

    strategy = Strategy(recompute=recompute, micro_batch_size=micro_batch_size)
    profiles = measure(ARCHITECTURE, strategy, device="cpu")
    memory = estimate_memory(strategy, profiles, WORK)
    assert memory.weights == close(sum(p.nbytes for p in unet.parameters()))
    assert memory.gradients == close(sum(p.grad.nbytes for p in unet.parameters() if p.grad is not None))
    assert memory.moments == close(states)
    assert profiles.unet.saved(micro_batch_size) == close(saved)


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_the_peak_of_a_real_backward_pass_is_the_traced_one(recompute: Any):
    setup = Setup(torch.float32, recompute, device="cpu")
    profile = profile_unet(ARCHITECTURE, setup, 16)
    backbone = Backbone.load("shapes/lcm", None, torch.device("cpu"), torch.float32)
    unet = prepare_unet(backbone.unet, setup)
    for rows in (1, 16, 40, 64):
        real = trace_unet(unet, ARCHITECTURE, setup, rows, trains=True)
        assert profile.training_peak(rows) == close(real.peak)
        assert profile.saved(rows) == close(real.saved)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(("stage", "dtype"), [(0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "bf16")])
def test_weights_states_and_gradients_are_those_of_a_real_engine(
    stage: Any, dtype: Any, monkeypatch: pytest.MonkeyPatch
):
    strategy = Strategy(dtype=dtype, zero_stage=stage)
    memory = estimate_memory(strategy, measure(ARCHITECTURE, strategy, device="cpu"), WORK)
    before = live_storages()
    unet = Backbone.load("shapes/lcm", None, torch.device("cpu"), estimate.DTYPES[dtype]).unet
    engine = Engine(unet, EngineConfig(stage, dtype), OptimizerConfig(), 1.0, 1, 2, 10)
    weight = next(p for p in unet.parameters() if p.ndim == 4)
    peaks = []
    for _ in range(4):  # two updates of two micro-batches
        engine.backward(sum((p.float().square().sum() for p in unet.parameters()), torch.zeros(())))
        peaks.append(bytes_since(before))
        engine.step()
    frozen = sum(p.nbytes for p in Backbone.load("shapes/lcm", None, torch.device("cpu"), weight.dtype).unet.buffers())
    assert bytes_since(before) - frozen == close(memory.weights + memory.master + memory.moments)
    with_gradients = memory.weights + memory.master + memory.moments + memory.gradients
    # DeepSpeed keeps its bucket between the micro-batches of an update at stage 1, and frees it at others
    assert max(peaks) == close(with_gradients + (memory.bucket if stage == 1 else 0))


def live_storages() -> dict[int, int]:
    """Address -> bytes of every tensor that Python can reach, gradients included."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    found += [thing.grad for thing in found if thing.is_leaf and thing.grad is not None]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found if t.device.type == "cpu"}


def bytes_since(before: dict[int, int]) -> int:
    return sum(size for address, size in live_storages().items() if address not in before)
