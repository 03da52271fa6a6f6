"""Nothing in the hot loop waits for the device: no copy to it and none from it inside sampling and a micro-batch.

Shown without a GPU on the meta device, which has shapes and no numbers: a mode sees every operation, counts those that
take a tensor from the CPU to the device, and what reads a number back raises by itself.
"""

# B samples, C H W latent

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

for package in ("diffusers", "deepspeed", "peft"):  # a machine with a GPU may lack them
    pytest.importorskip(package)

from tiny_policies import engine_of  # noqa: E402

from benchmarks.shared import tiny_pipelines  # noqa: E402
from rlcm_fast.algorithms import build_algorithm  # noqa: E402
from rlcm_fast.config import AlgorithmConfig, PolicyConfig, UpdateConfig  # noqa: E402
from rlcm_fast.policies import GaussianPolicy, Network, SeededNoise, build_policy  # noqa: E402
from rlcm_fast.stages.rollout_updates import RolloutUpdates  # noqa: E402
from rlcm_fast.stages.start_model import StartOutputs  # noqa: E402
from rlcm_fast.stages.update import Updater  # noqa: E402
from rlcm_fast.trajectory import Batch, Conditioning, Trajectory  # noqa: E402

NUM_SAMPLES, NUM_STEPS = 4, 3
META = torch.device("meta")
BETAS = {**tiny_pipelines.BETAS, "num_train_timesteps": 1000}
LCM = {**BETAS, "_class_name": "LCMScheduler", "original_inference_steps": 50, "timestep_scaling": 10.0}
DDIM = {**BETAS, "_class_name": "DDIMScheduler", "steps_offset": 1, "set_alpha_to_one": False}
KINDS = {
    "guidance as an input": (LCM, {"time_cond_proj_dim": 16}, 4.0),
    "both halves": (DDIM, {}, 5.0),
    "sdxl": (LCM, {"is_sdxl": True}, 1.0),
}


class Copies(TorchDispatchMode):
    """Counts operations that are no views, and those of all that mix tensors of the CPU and of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        if not func.is_view:
            self.operations[str(func)] += 1
        if len({tensor.device.type for tensor in tensors}) > 1:
            self.copies.append(str(func))
        return result


class PlainEngine:
    """Goes backward, and steps nothing."""

    skips_whole_updates = True

    def __init__(self, network: torch.nn.Module) -> None:
        self.network = network

    def begin_update(self, num_micro_batches: int) -> None:
        self.num_left = num_micro_batches

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self.network(*arguments, **keywords)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float | None:
        self.num_left -= 1
        return None if self.num_left else 1.0


def policy_of(kind: str, device: torch.device = META) -> GaussianPolicy:
    scheduler, settings, guidance = KINDS[kind]
    unet: Any = tiny_pipelines.unet(**settings).to(device)
    config = PolicyConfig(num_steps=NUM_STEPS, guidance_scale=guidance)
    return build_policy(config, Network(PlainEngine(unet), unet.config, device=device), scheduler)


def conditioning(kind: str, device: torch.device = META) -> Conditioning:
    is_sdxl = kind == "sdxl"
    width = tiny_pipelines.WIDTH + tiny_pipelines.WIDTH_2 * is_sdxl
    torch.manual_seed(0)
    parts: dict[str, Any] = {"negative_embeds": torch.randn(1, 7, width)} if kind == "both halves" else {}
    if is_sdxl:
        pooled = torch.randn(2, tiny_pipelines.POOLED)
        parts = {"pooled_embeds": pooled, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16]])}
    made = Conditioning(torch.randn(2, 7, width), torch.tensor([0, 1, 0, 1]), **parts)
    tensors = {name: value.to(device) for name, value in vars(made).items() if value is not None}
    return replace(made, **tensors)


def updates_of(kind: str, update: UpdateConfig, device: torch.device = META) -> tuple[RolloutUpdates, Trajectory]:
    """What trains on a rollout of random states."""
    policy = policy_of(kind, device)
    torch.manual_seed(1)
    states = torch.randn(NUM_SAMPLES, policy.num_actions + 1, *policy.latent_shape).to(device)
    log_probs = torch.full((NUM_SAMPLES, policy.num_actions), -1.0).to(device)
    trajectory = Trajectory(states, log_probs, conditioning(kind, device))
    engine: Any = policy.unet
    updater = Updater(policy, build_algorithm(AlgorithmConfig(), update), engine, update, say=lambda line: None)
    rows = torch.arange(trajectory.num_transitions)
    updates = RolloutUpdates(updater, trajectory, torch.ones(NUM_SAMPLES, device=device), rows, lambda: None)
    if update.kl_weight:
        m = torch.zeros_like(trajectory.latents[:, 1:]).flatten(0, 1)
        updates._start_outputs = {0: StartOutputs(m, rows.to(device))}
    return updates, trajectory


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_copies_nothing_to_the_device_and_reads_nothing_back(kind: str):
    policy, texts = policy_of(kind), conditioning(kind)
    noise = SeededNoise.draw(NUM_SAMPLES, policy.num_actions, torch.Generator().manual_seed(1), META)
    with Copies() as seen:
        trajectory, x_0 = policy.sample(texts, noise)
    assert seen.copies == []
    assert trajectory.latents.device == x_0.device == META
    with Copies() as drawn:
        policy.sample(texts, torch.Generator().manual_seed(1))
    assert len(drawn.copies) == 1 + policy.num_actions, "the count sees those of a generator on the CPU"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("update", [UpdateConfig(num_passes=2), UpdateConfig(kl_weight=0.1)], ids=["passes", "kl"])
def test_a_micro_batch_of_the_update_copies_nothing_and_reads_nothing(kind: str, update: UpdateConfig):
    updates, _ = updates_of(kind, update)
    engine: Any = updates._updater.engine
    engine.begin_update(2)
    with Copies() as seen:
        updates._backward(Batch(0, torch.arange(4, device=META), torch.ones(4, device=META)), 0.5)
    assert seen.copies == []
    assert seen.operations["aten.convolution_backward.default"] > 0, "it went backward"


@pytest.mark.usefixtures("one_process")
def test_adding_up_many_micro_batches_copies_nothing_and_reads_nothing():
    """More than 64, whose sums are rounded with random numbers of the step and of the addition."""
    network = torch.nn.Conv2d(3, 4, 3).bfloat16().to(META)
    engine = engine_of(network, 65, 0, "pure_bf16", name="adamw_8bit")
    with Copies() as seen:
        engine.begin_update(65)
        for _ in range(2):
            engine.backward(engine(torch.empty(1, 3, 8, 8, dtype=torch.bfloat16, device=META)).float().mean())
    assert seen.copies == []
    assert seen.operations["aten.bitwise_xor_.Tensor"] > 0, "it drew random numbers"


def test_an_update_copies_its_indices_once_however_many_micro_batches_it_has(monkeypatch: pytest.MonkeyPatch):
    counts = []
    for size in (1, 8):
        updates, trajectory = updates_of("both halves", UpdateConfig(micro_batch_size=size, num_passes=2))
        all_places = list(torch.arange(trajectory.num_transitions).split(size))
        monkeypatch.setattr(updates, "_micro_batches", lambda *_, of=all_places: of)  # it reads which are silent
        rows = torch.arange(trajectory.num_transitions)
        signals = torch.ones(len(rows), device=META)
        with Copies() as seen:
            updates.train_on(rows, signals)
        counts.append(len(seen.copies))
    assert counts == [2, 2]  # the rows, and the places that are kept


def test_the_statistics_of_an_iteration_are_read_in_one_transfer(monkeypatch: pytest.MonkeyPatch):
    updates, trajectory = updates_of("sdxl", UpdateConfig(micro_batch_size=2), torch.device("cpu"))
    rows = torch.arange(trajectory.num_transitions)
    updates.train_on(rows, updates.signals(rows))
    summary = updates.record.summary(1.0)
    reads: list[str] = []

    def noted(name: str) -> Any:
        method = getattr(Tensor, name)
        return lambda self, *rest: reads.append(name) or method(self, *rest)

    for name in ("tolist", "item", "cpu", "__bool__", "__float__"):
        monkeypatch.setattr(Tensor, name, noted(name))
    metrics = summary.metrics(torch.ones(NUM_SAMPLES))
    assert reads == ["tolist"]
    assert metrics["ratio/mean"] == 1.0 and metrics["advantage/abs_mean"] == 1.0


# Operations of a sampling step and of a micro-batch of the update, with the tiny UNet: each is a launch on a GPU. They
# are those of torch 2.13 and diffusers 0.42; raise them only if a new version of these needs more.
MOST_OPERATIONS = {"guidance as an input": (385, 892), "both halves": (389, 898)}


@pytest.mark.parametrize("kind", MOST_OPERATIONS)
def test_the_number_of_operations_does_not_grow(kind: str):
    policy, texts = policy_of(kind), conditioning(kind)
    with Copies() as sampling:
        policy.sample(texts, torch.Generator().manual_seed(1))
    updates, _ = updates_of(kind, UpdateConfig())
    engine: Any = updates._updater.engine
    engine.begin_update(2)
    with Copies() as update:
        updates._backward(Batch(0, torch.arange(4, device=META), torch.ones(4, device=META)), 0.5)
    steps, micro_batch = MOST_OPERATIONS[kind]
    num_operations = (sampling.operations.total() // policy.num_steps, update.operations.total())
    assert num_operations[0] <= steps and num_operations[1] <= micro_batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_synchronises_on_a_gpu(kind: str):
    device = torch.device("cuda")
    policy, texts = policy_of(kind, device), conditioning(kind, device)
    noise = SeededNoise.draw(NUM_SAMPLES, policy.num_actions, torch.Generator().manual_seed(1), device)
    updates, _ = updates_of(kind, UpdateConfig(num_passes=2), device)
    engine: Any = updates._updater.engine
    rows, signals = torch.arange(4, device=device), torch.ones(4, device=device)
    for mode in ("default", "error"):  # the first time kernels are compiled
        torch.cuda.set_sync_debug_mode(mode)
        try:
            policy.sample(texts, noise)
            engine.begin_update(2)
            updates._backward(Batch(0, rows, signals), 0.5)
        finally:
            torch.cuda.set_sync_debug_mode("default")
