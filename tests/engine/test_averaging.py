"""The moving average of the weights: its arithmetic, and what a run does with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file
from tiny_policies import TinyNetwork
from torch import Tensor

from rlcm_fast.config import EmaConfig, EngineConfig, OptimizerConfig, parse_config
from rlcm_fast.engine.averaging import AveragingEngine, WeightAverage
from rlcm_fast.engine.base import UpdatePlan
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
DEVICES = ("model", "cpu")


def make_engine(network: Any, config: EmaConfig, stage: Any = 0, dtype: Any = "fp32") -> AveragingEngine:
    engine = ZeroEngine(network, EngineConfig(stage, dtype), OptimizerConfig(lr=1e-1), UpdatePlan(2, 10, 0.0), 0)
    return AveragingEngine(engine, network, config)


def micro_batch(engine: AveragingEngine, network: torch.nn.Module) -> bool:
    """Whether it ended an update."""
    engine.backward(torch.stack([p.float().square().sum() for p in network.parameters()]).sum())
    return engine.step() is not None


def weights_of(network: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in network.named_parameters()}


@pytest.mark.parametrize("stage, dtype", [(0, "fp32"), (1, "bf16"), (2, "bf16")])
@pytest.mark.parametrize("device", DEVICES)
def test_the_average_follows_every_update_in_float32(device: Any, stage: int, dtype: str):
    network = TinyNetwork()
    engine = make_engine(network, EmaConfig(0.3, device), stage, dtype)
    assert engine.average is not None
    expected: dict[str, Tensor] = {}
    for n in range(1, 6):
        assert not micro_batch(engine, network)
        before = engine.average.weights()
        assert micro_batch(engine, network)
        decay = min(0.3, n / (n + 9)) if n > 1 else 0.0
        for name, weight in weights_of(network).items():
            weight = weight.float()
            expected[name] = weight if n == 1 else decay * expected[name] + (1 - decay) * weight
            torch.testing.assert_close(engine.average.weights()[name], expected[name])
            assert not torch.equal(before[name], expected[name]), "it moves with updates, not with micro-batches"
    own = weights_of(network)
    with engine.averaged():
        for name, weight in weights_of(network).items():
            assert torch.equal(weight, engine.average.weights()[name].to(weight.dtype))
    assert all(torch.equal(weight, own[name]) for name, weight in weights_of(network).items())
    final = engine.final_weights()
    assert all(torch.equal(final[name], weight) for name, weight in engine.average.weights().items())


def test_the_networks_own_weights_come_back_after_an_error():
    network = TinyNetwork()
    average = WeightAverage(network, EmaConfig(0.9))
    for parameter in network.parameters():
        parameter.data += 1
    own = weights_of(network)

    def fail() -> None:
        with average.applied():
            assert not any(torch.equal(weight, own[name]) for name, weight in weights_of(network).items())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert all(torch.equal(weight, own[name]) for name, weight in weights_of(network).items())


def test_without_a_decay_there_is_no_average(tmp_path: Path):
    network = TinyNetwork()
    engine = make_engine(network, EmaConfig())
    own = weights_of(network)
    with engine.averaged():
        assert all(torch.equal(weight, own[name]) for name, weight in weights_of(network).items())
    engine.save(tmp_path)
    assert not (tmp_path / "ema.safetensors").exists()
    with pytest.raises(ValueError, match="holds no ema.safetensors: its run had ema.decay=0; set it to 0, or start"):
        make_engine(TinyNetwork(), EmaConfig(0.9)).load(tmp_path)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_run_evaluates_and_exports_the_average_and_resumes_it_bitwise(
    lora_rank: int, tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def make_trainer(**more: object) -> Trainer:
        settings = {"ema.decay": 0.9, "lora.rank": lora_rank, "evaluation.every": 3, "checkpoint.every": 2}
        return Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", {**settings, **more})))

    trainer = make_trainer()
    seen: list[dict[str, Tensor]] = []
    (evaluator,) = trainer.evaluation.evaluators
    watched = lambda *a: (seen.append(trainer.engine.full_weights()), evaluator(*a))[1]  # noqa: E731
    monkeypatch.setattr(trainer, "evaluation", replace(trainer.evaluation, evaluators=[watched]))  # type: ignore[list-item]
    trainer.run()
    average = trainer.engine.average
    assert average is not None
    final, own = average.weights(), trainer.engine.full_weights()
    assert len(seen) == 2
    assert all(torch.equal(seen[-1][name], weight) for name, weight in final.items())
    assert all(not torch.equal(own[name], weight) for name, weight in final.items() if weight.ndim > 1)
    assert len(final) == sum(".lora_" in name or lora_rank == 0 for name in own)
    if not lora_rank:
        exported = load_file(tmp_path / "run" / "export" / "unet" / "diffusion_pytorch_model.safetensors")
        assert all(torch.equal(exported[name], weight) for name, weight in final.items())

    resumed = make_trainer(resume=tmp_path / "run" / "checkpoints" / "iteration_000002")
    resumed.run()
    assert resumed.engine.average is not None
    assert all(torch.equal(final[name], weight) for name, weight in resumed.engine.average.weights().items())
    assert all(torch.equal(own[name], weight) for name, weight in resumed.engine.full_weights().items())
