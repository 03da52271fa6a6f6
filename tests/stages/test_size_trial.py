"""A trial lowers sizes that are out of memory, and leaves nothing behind; out of memory is made up on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from tiny_policies import TinyBackbone, TinyNetwork, policy_of
from torch import Tensor

from rlcm_fast import build, parallel
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import Batches, Candidates, batches_of, with_batches
from rlcm_fast.planner.estimate import GIB
from rlcm_fast.stages import size_trial
from rlcm_fast.stages.chosen_batches import Choice, Plan
from rlcm_fast.stages.size_trial import DoesNotFit, SizeTrial, settle_sizes
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Conditioning, Prompt

pytestmark = pytest.mark.usefixtures("one_process")
CANDIDATES = Candidates(update=(16, 8, 4, 2, 1), rollout=(8, 4, 2, 1), decode=(4, 2, 1))


class MadeUpPlan(Plan):
    """Plans 10 GiB for every stage, of which a pass takes 2 and the context 1."""

    def memory(self, sizes: Batches) -> Any:
        stages = dict.fromkeys(("sampling", "decoding", "update"), 10 * GIB)
        return SimpleNamespace(stages=stages, overhead=GIB, sampling=2 * GIB, decoding=2 * GIB, activations=2 * GIB)


class MadeUpMemory:
    """Has 4 GiB of tensors; every pass takes one more."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.taken: list[float] = []

    def allocated(self) -> int:
        return 4 * GIB

    def peak(self, run: Callable[[], None], taken: int) -> int:
        self.taken.append(taken / GIB)
        run()
        return 4 * GIB + taken + GIB

    def clear(self) -> None:
        pass


class Pipeline(TinyBackbone):
    """Decodes at most `most` images at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def encode(self, prompts: Sequence[Prompt], with_negative: bool, remember: bool = True) -> Conditioning:
        assert not remember
        return super().encode([Prompt("a")], with_negative)

    def rehearse_decoding(self, latents: Tensor) -> None:
        limit(len(latents), self.most)


class Network(TinyNetwork):
    """Samples and trains at most so many rows."""

    def __init__(self, sampled: int, trained: int) -> None:
        super().__init__()
        self.most = {False: sampled, True: trained}

    def forward(self, x_t: Tensor, *inputs: Any, **more: Any) -> tuple[Tensor]:
        limit(len(x_t), self.most[torch.is_grad_enabled()])
        return super().forward(x_t, *inputs, **more)


def limit(num_rows: int, most: int) -> None:
    if num_rows > most:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def trial_of(sampled: int, decoded: int, trained: int, config: Config | None = None) -> tuple[SizeTrial, list[str]]:
    said: list[str] = []
    config = with_batches(config or Config(), Batches(16, 8, 4))
    policy, pipeline = policy_of(Network(sampled, trained)), Pipeline(decoded)
    plan, memory = MadeUpPlan(CANDIDATES), MadeUpMemory()
    return SizeTrial(config, plan, policy, pipeline, memory, said.append), said  # type: ignore[arg-type]


def test_sizes_that_fit_stay_and_the_peaks_are_said():
    trial, said = trial_of(64, 64, 64)
    assert trial() == Batches(16, 8, 4)
    peaks = ", ".join(f"{stage} 8.0 (9.0)" for stage in ("sampling", "decoding", "update"))
    assert said == [f"auto: tried {Batches(16, 8, 4)}; GiB of tensors at the peak, and planned: {peaks}"]
    # Of 10 GiB, 4 are there, 1 is the context and 2 are what the pass itself takes.
    assert trial.memory.taken == [3, 3, 3]  # type: ignore[attr-defined]


def test_each_size_that_is_out_of_memory_is_lowered_with_a_line():
    trial, said = trial_of(sampled=7, decoded=1, trained=3)
    assert trial() == Batches(update=2, rollout=4, decode=1)
    assert said[:-1] == [
        "auto: rollout.micro_batch_size=8 is out of memory in a trial of the sampling; trying 4",
        "auto: rollout.decode_batch_size=4 is out of memory in a trial of the decoding; trying 2",
        "auto: rollout.decode_batch_size=2 is out of memory in a trial of the decoding; trying 1",
        "auto: update.micro_batch_size=16 is out of memory in a trial of the update; trying 8",
        "auto: update.micro_batch_size=8 is out of memory in a trial of the update; trying 4",
        "auto: update.micro_batch_size=4 is out of memory in a trial of the update; trying 2",
    ]


def test_where_the_smallest_is_out_of_memory_the_run_ends():
    message = "the update with update.micro_batch_size=1, and there is nothing smaller to take; rlcm-fast plan says"
    with pytest.raises(DoesNotFit, match=message) as found:
        trial_of(8, 8, 0)[0]()
    assert found.value.is_on_all_processes


def test_a_number_that_the_user_gave_is_not_lowered():
    trial, _ = trial_of(8, 8, 8)
    given = replace(trial, plan=MadeUpPlan(replace(CANDIDATES, update=(16,))))
    with pytest.raises(DoesNotFit, match=r"update.micro_batch_size=16"):
        given()


def test_what_is_over_the_memory_that_the_run_may_have_is_lowered():
    config = parse_config(["--engine.memory_gib=8.9"])  # 8 GiB of tensors at the peak and 1 of context
    with pytest.raises(DoesNotFit, match=r"rollout.micro_batch_size=1"):
        trial_of(64, 64, 64, config)[0]()
    assert trial_of(64, 64, 64, parse_config(["--engine.memory_gib=9"]))[0]() == Batches(16, 8, 4)


def test_what_another_process_has_no_memory_for_is_lowered_here_too(monkeypatch: pytest.MonkeyPatch):
    found = iter([True, False, False, False])
    monkeypatch.setattr(parallel, "any_rank", lambda flag: next(found))
    assert trial_of(64, 64, 64)[0]() == Batches(16, 4, 4)


def test_a_trial_leaves_no_gradients_and_draws_none_of_the_run_s_random_numbers():
    trial, _ = trial_of(64, 64, 64)
    network: Any = trial.policy.unet
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    trial()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(weight.grad is None and not weight._backward_hooks for weight in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_trial_compiles_nothing():
    trial, _ = trial_of(64, 64, 64)
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    network: Any = trial.policy.unet
    network.forward = torch.compile(network.forward, backend=backend)
    trial()
    assert compiled == []


def test_sizes_that_were_not_chosen_just_now_are_not_tried():
    policy, pipeline = policy_of(Network(0, 0)), Pipeline(0)
    assert settle_sizes(Choice(Config()), policy, pipeline) == Config()  # type: ignore[arg-type]
    config = parse_config(["--engine.zero_stage=3"])
    choice = Choice(config, MadeUpPlan(CANDIDATES))
    assert settle_sizes(choice, policy, pipeline) is config  # type: ignore[arg-type]


def test_a_run_has_the_lowered_sizes_everywhere_and_trains_as_if_they_had_been_given(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run(name: str, settings: dict[str, object]) -> Trainer:
        options = {"num_iterations": 1, "checkpoint.every": 1, **settings}
        trainer = Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / name, options)))
        trainer.run()
        return trainer

    given = run("given", {"update.micro_batch_size": 2, "rollout.micro_batch_size": 1, "rollout.decode_batch_size": 1})

    # Begin with larger ones, and let the trial alone run out of memory: what follows has fitting sizes.
    load = Backbone.load

    def small(*arguments: Any, **keywords: Any) -> Backbone:
        backbone = load(*arguments, **keywords)

        def check(network: Any, inputs: Any) -> None:
            limit(len(inputs[0]), 2 if torch.is_grad_enabled() else 1)

        backbone.unet.register_forward_pre_hook(check)
        return backbone

    def choose(config: Config, device: torch.device) -> Choice:
        plan = MadeUpPlan(Candidates(update=(4, 2, 1), rollout=(4, 2, 1), decode=(1,)))
        return Choice(with_batches(config, Batches(4, 4, 1)), plan)

    monkeypatch.setattr(Backbone, "load", small)
    monkeypatch.setattr(build, "choose_batches", choose)
    monkeypatch.setattr(size_trial, "DeviceMemory", MadeUpMemory)
    more = {"evaluation.micro_batch_size": 1, "tracking.grid_images": 1}
    lowered = run("lowered", more)
    assert batches_of(lowered.config) == batches_of(given.config) == Batches(2, 1, 1)
    assert batches_of(parse_config([f"--config={tmp_path / 'lowered' / 'config.yaml'}"])) == Batches(2, 1, 1)
    state = json.loads((tmp_path / "lowered" / "checkpoints" / "iteration_000001" / "state.json").read_text())
    assert state["fingerprint"]["fields"]["update.micro_batch_size"] == 2
    one, other = given.engine.full_weights(), lowered.engine.full_weights()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
