"""What networks compiled whole and CUDA graphs add to the plan; sizes are made up, so each sum is known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_runs

from rlcm_fast import graphs
from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.resolved import resolve
from rlcm_fast.planner.estimate import Memory, Profiles, Strategy, estimate_memory, strategy_of
from rlcm_fast.planner.replay import Graphed
from rlcm_fast.planner.tracing import Curve, Flops, ImageProfile, NetworkProfile, VaeProfile
from rlcm_fast.planner.workload import Workload
from rlcm_fast.stages import graphing
from rlcm_fast.trainer import Trainer

MIB, NUM_WEIGHTS = 2**20, 1_000_000
PURE = Strategy(dtype="pure_bf16", optimizer="adamw_8bit", micro_batch_size=32, rollout_micro_batch_size=16)
IN_PLACE = {"engine.dtype": "pure_bf16", "optimizer.name": "adamw_8bit"}  # keeps gradients in one place
WORK = Workload.of(resolve(Config(), 1))  # 64 images of 4 steps, 192 transitions


def by_rows(size: int) -> Curve:
    return Curve(((1, size), (2, 2 * size)))


def profiles() -> Profiles:
    flops, image = Flops(1, 1), ImageProfile(1, by_rows(3 * MIB), Flops(1, 1))
    curves = by_rows(1), by_rows(4 * MIB), by_rows(2 * MIB)
    unet = NetworkProfile((NUM_WEIGHTS,), 0, *curves, flops, flops, 1, 3)
    return Profiles(unet, VaeProfile(image, image), 10, latent_bytes=1000, text_bytes=300)


def memory_of(strategy: Strategy, workload: Workload = WORK) -> Memory:
    return estimate_memory(strategy, profiles(), workload)


def test_whole_gradients_are_beside_the_sums_of_several_micro_batches():
    whole = replace(PURE, compile="whole")
    several, eager = memory_of(whole), memory_of(PURE)
    assert several.second_gradients == 2 * NUM_WEIGHTS
    assert several.stages["update"] - eager.stages["update"] == 2 * NUM_WEIGHTS
    assert several.stages["step"] == eager.stages["step"]  # they are gone by then
    assert memory_of(replace(PURE, compile="regional")).second_gradients == 0
    one_pass = replace(whole, micro_batch_size=192)
    assert memory_of(one_pass).second_gradients == 0  # they become the sums
    assert memory_of(replace(one_pass, real_image_micro_batch_size=4)).second_gradients == 2 * NUM_WEIGHTS


def test_whole_gradients_of_shares_are_all_there_at_once():
    two, shared = replace(WORK, num_processes=2), Strategy(compile="whole", zero_stage=2, micro_batch_size=192)
    assert memory_of(shared, two).second_gradients == 4 * NUM_WEIGHTS
    assert memory_of(replace(shared, zero_stage=1), two).second_gradients == 0
    adapters = replace(shared, dtype="bf16", lora_rank=4, micro_batch_size=32)
    assert memory_of(adapters, two).second_gradients == 4 * NUM_WEIGHTS  # adapters are float32


def test_graphs_hold_gradients_and_keep_the_largest_activations():
    plain, graphed = memory_of(PURE), memory_of(replace(PURE, graphs="auto"))
    assert graphed.graphed == Graphed(True, True, True)
    assert graphed.held_gradients == plain.gradients == 2 * NUM_WEIGHTS
    assert graphed.graph_pool == graphed.activations == 128 * MIB
    kept = graphed.held_gradients + graphed.graph_copies
    assert graphed.stages["encoding"] == plain.stages["encoding"] + kept + 128 * MIB
    assert graphed.stages["sampling"] == plain.stages["sampling"] + kept + (128 - 32) * MIB
    # The first update runs once as it is, beside the pool of the rollout.
    rollout_pool = max(graphed.sampling, graphed.decoding)
    assert graphed.stages["update"] == plain.stages["update"] + graphed.graph_copies + rollout_pool
    assert graphed.stages["step"] == plain.stages["step"] + graphed.graph_copies + graphed.graph_pool


def test_graphs_copy_what_they_read():
    copies = memory_of(replace(PURE, graphs="on")).graph_copies
    sampling, decoding = 16 * ((3 + 3) * 1000 + 300), 16 * 1000
    updates = 2 * 32 * (2 * 1000 + 300)
    assert copies == sampling + decoding + updates
    with_start = memory_of(replace(PURE, graphs="on", start_model="adapters")).graph_copies
    assert with_start == copies + 2 * 32 * 1000


def test_each_image_size_has_its_graphs_and_is_recorded_beside_those_of_another():
    graphed = replace(PURE, graphs="auto")
    one, two = memory_of(graphed), memory_of(graphed, replace(WORK, num_image_sizes=2))
    assert two.graphed == Graphed(True, True, True, num_image_sizes=2)
    assert two.graph_copies == 2 * one.graph_copies
    assert two.graph_pool == one.graph_pool == one.activations
    assert two.stages["update"] - one.stages["update"] == one.graph_copies + one.activations - max(
        one.sampling, one.decoding
    )
    assert two.stages["sampling"] - one.stages["sampling"] == one.graph_copies + one.sampling


def test_work_without_a_graph_runs_beside_the_pool():
    zero = replace(PURE, dtype="bf16", optimizer="adamw", zero_stage=1, moves_idle=True)
    plain, graphed = memory_of(zero), memory_of(replace(zero, graphs="auto"))
    assert graphed.graphed == Graphed(sampling=True)
    assert graphed.held_gradients == 0
    added = graphed.graph_copies + graphed.sampling
    for stage in ("encoding", "decoding", "update", "step"):
        assert graphed.stages[stage] == plain.stages[stage] + added
    assert graphed.stages["sampling"] == plain.stages["sampling"] + graphed.graph_copies


@pytest.mark.parametrize("changed", [{"lora_rank": 4}, {"dtype": "fp32"}, {"optimizer_in_backward": True}])
def test_updates_that_cannot_be_replayed_have_no_graph(changed: Any):
    strategy = replace(PURE, graphs="auto", **changed)
    assert not Graphed.of(strategy, 1).updates


class NoDevice:
    """Records nothing, after which the work runs as it is."""

    def record(self, run: Any) -> Any:
        raise RuntimeError("no device")

    def forget(self) -> None:
        pass


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    "settings",
    [{}, {**IN_PLACE}, {**IN_PLACE, "model.image_sizes": [[24, 16], [16, 16]]}, {"engine.zero_stage": 1}],
    ids=["fp32", "pure_bf16", "two sizes", "ZeRO-1"],
)
def test_the_plan_replays_what_a_run_replays(tiny_lcm_folder: str, tmp_path: Any, monkeypatch: Any, settings: Any):
    monkeypatch.setattr(graphing, "recorder_of", lambda device: NoDevice())
    named = {"engine.graphs": "auto", **settings}
    config = parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", named))
    trainer = Trainer(config)
    graphed = Graphed.of(strategy_of(config), max(1, len(config.model.sizes)))
    assert isinstance(trainer.images.graphs, graphs.Graphs) == graphed.sampling
    assert (trainer.updater.graphed is not None) == graphed.updates
    trainer.parts.close()
