"""Two processes over gloo: who draws what, what they share, ZeRO's stages, and what happens when one dies."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import two_ranks
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.shared import run_processes
from rlcm_fast.algorithms import build_advantages
from rlcm_fast.config import AdvantagesConfig
from rlcm_fast.trajectory import Prompt

STAGES = (0, 1, 2, 3)
# A large eps keeps Adam from blowing up the rounding noise of gradients that are zero but for it.
SETTINGS = {
    "prompts.num_prompts": 4,
    "num_iterations": 2,
    "optimizer.eps": 1e-3,
    "rollout.micro_batch_size": 4,
    "evaluation.every": 2,
}
FEW = {"policy.num_steps": 2, "prompts.num_prompts": 2, "update.micro_batch_size": 1, "evaluation.every": 0}
ADAPTERS = {**FEW, "engine.zero_stage": 3, "lora.rank": 2, "lora.targets": ["to_q"], "update.kl_weight": 0.1}
SETS = {"num_iterations": 1, "rewards": [{"name": "diversity", "group_size": 2}], "evaluation.num_images": 4}
ONE = {"source": "shapes:one", "rewards": [{"name": tiny_runs.REWARD}]}
TASKS = {"tasks": [{"name": name, **ONE} for name in "ab"], "num_iterations": 1, "engine.zero_stage": 1}
GUARD = {"guard.action": "raise_kl", "guard.every": 1, "guard.z": 1e-6, "guard.floor": 0.0}  # any change is outside
HELD_OUT = {"evaluation.rewards": [{"name": "jpeg_incompressibility"}, {"name": "jpeg_compressibility"}]}
RUNS: dict[str, dict[str, object]] = {
    **{f"stage_{stage}": {**SETTINGS, "engine.zero_stage": stage} for stage in STAGES},
    "again": SETTINGS,
    **{
        f"pure_bf16_{i}": {
            **SETTINGS,
            "engine.dtype": "pure_bf16",
            "engine.optimizer_in_backward": bool(i),
            "update.micro_batch_size": 4,
            "optimizer.name": "adamw_8bit",
        }
        for i in range(2)
    },
    "average": {**SETTINGS, "engine.zero_stage": 1, "ema.decay": 0.9},
    "adapters": {**SETTINGS, **ADAPTERS},
    "sets": {**SETTINGS, **SETS},
    **{f"tasks_{every}": {**SETTINGS, **TASKS, "tracking.task_gradients_every": every} for every in (0, 1)},
    "guarded": {**SETTINGS, **GUARD, **HELD_OUT, "num_iterations": 3},
    "few_images": {**SETTINGS, "evaluation.num_images": 2, "num_iterations": 1, "tracking.grid_every": 1},
}


@pytest.fixture(scope="module")
def folder(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two_processes")
    group = (2, run_processes.free_port())
    target = (two_ranks.run_watched, tiny_lcm_folder, folder, RUNS)
    processes = [run_processes.start(*target, log=folder / f"{rank}.log", rank=rank, group=group) for rank in range(2)]
    for rank, process in enumerate(processes):
        process.join(timeout=600)
        assert process.exitcode == 0, (folder / f"{rank}.log").read_text()[-3000:]
    return folder


def seen(folder: Path, run: str = "stage_0") -> list[dict[str, Any]]:
    """By rank; lists by iteration."""
    return [torch.load(folder / f"{run}_{rank}.pt", weights_only=True) for rank in range(2)]


def _exported(folder: Path, run: str) -> dict[str, Tensor]:
    (weights,) = (folder / run / "export" / "unet").glob("*.safetensors")
    return load_file(weights)


def largest_difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return max((first[name] - second[name]).abs().max().item() for name in first)


def test_measuring_the_gradients_of_tasks_leaves_shared_gradients_alone(folder: Path):
    plain, measured = seen(folder, "tasks_0"), seen(folder, "tasks_1")
    assert largest_difference(plain[0]["weights"], measured[0]["weights"]) == 0.0
    line = tiny_runs.metrics(folder / "tasks_1")[0]
    assert line["gradient/a/norm"] > 0 and -1 <= line["gradient/a/b/cosine"] <= 1


def test_prompts_of_an_iteration_are_disjoint_between_ranks(folder: Path):
    for mine, other in zip(*(rank["prompts"] for rank in seen(folder)), strict=True):
        assert len(mine) == len(other) == 4
        assert not set(mine) & set(other)


def test_no_noise_is_drawn_twice(folder: Path):
    noise = torch.cat([batch.flatten(1) for rank in seen(folder) for batch in rank["noise"]])
    assert len(noise.unique(dim=0)) == len(noise) == 16


def test_advantages_come_from_the_rewards_of_all_ranks(folder: Path):
    advantages = build_advantages("prompt", AdvantagesConfig(buffer_size=6, min_count=3))
    first, second = seen(folder)
    for i in range(2):
        prompts = [Prompt(text) for text in first["prompts"][i] + second["prompts"][i]]
        expected = advantages(torch.cat([first["rewards"][i], second["rewards"][i]]), prompts)
        assert torch.equal(torch.cat([first["advantages"][i], second["advantages"][i]]), expected)


def test_metrics_are_of_all_processes_and_written_once(folder: Path):
    lines = tiny_runs.metrics(folder / "stage_0")
    assert [line["iteration"] for line in lines] == [0, 1, 2]
    assert [line["queries"] for line in lines] == [8, 16, 16]
    for i, line in enumerate(lines[:2]):
        rewards = torch.cat([rank["rewards"][i] for rank in seen(folder)]).double()
        advantages = torch.cat([rank["advantages"][i] for rank in seen(folder)])
        assert line["reward/total/mean"] == pytest.approx(rewards.mean().item())
        assert line["reward/total/std"] == pytest.approx(rewards.std(correction=0).item())
        assert line["advantage/abs_mean"] == pytest.approx(advantages.abs().mean().item())


def test_all_ranks_have_the_same_weights_and_they_are_those_of_the_export(folder: Path):
    for run in RUNS:
        first, second = (rank["weights"] for rank in seen(folder, run))
        assert largest_difference(first, second) == 0.0
    assert largest_difference(seen(folder, "stage_3")[0]["weights"], _exported(folder, "stage_3")) == 0.0


def test_all_ranks_move_the_weight_of_the_kl_term_alike(folder: Path):
    first, second = (rank["kl_weight"] for rank in seen(folder, "guarded"))
    assert first == second
    assert first["value"] > 0


def test_all_ranks_have_the_same_average_and_it_is_what_is_exported(folder: Path):
    first, second = (rank["final_weights"] for rank in seen(folder, "average"))
    assert largest_difference(first, second) == 0.0
    assert largest_difference(first, seen(folder, "average")[0]["weights"]) > 1e-4
    assert largest_difference(first, _exported(folder, "average")) == 0.0


def test_adapters_that_zero_3_shares_out_are_exported_whole(folder: Path):
    """The KL term's start model is the same network with its adapters off, gathered a second time."""
    start, trained = seen(folder, "stage_0")[0]["start"], seen(folder, "adapters")[0]["weights"]
    frozen = {name.replace(".base_layer", ""): value for name, value in trained.items() if ".lora_" not in name}
    assert largest_difference(start, frozen) == 0.0
    assert largest_difference(start, _exported(folder, "adapters")) > 1e-4
    exported = load_file(folder / "adapters" / "lora" / "pytorch_lora_weights.safetensors")
    names = {name: name.replace(".default", "").removeprefix("unet.") for name in trained if ".lora_" in name}
    assert all(torch.equal(exported[f"unet.{name}"], trained[of]) for of, name in names.items())
    lines = tiny_runs.metrics(folder / "adapters")
    assert lines[0]["kl_to_start"] < lines[1]["kl_to_start"]


def test_a_run_repeats_itself_exactly(folder: Path):
    assert tiny_runs.metrics(folder / "stage_0") == tiny_runs.metrics(folder / "again")
    assert largest_difference(seen(folder)[0]["weights"], seen(folder, "again")[0]["weights"]) == 0.0


@pytest.mark.parametrize("stage", STAGES[1:])
def test_zero_stages_agree_after_four_updates(stage: int, folder: Path):
    weights, others = seen(folder)[0]["weights"], seen(folder, f"stage_{stage}")[0]["weights"]
    assert largest_difference(weights, others) < 1e-6
    for line, other in zip(*(tiny_runs.metrics(folder / run) for run in ("stage_0", f"stage_{stage}")), strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("in_backward", [0, 1])
def test_weights_without_a_master_follow_those_of_float32_to_their_last_digits(in_backward: int, folder: Path):
    weights, others = seen(folder)[0]["weights"], seen(folder, f"pure_bf16_{in_backward}")[0]["weights"]
    pairs = [((others[name] - weight).flatten(), weight.flatten()) for name, weight in weights.items()]
    apart, length = (torch.cat(parts).norm() for parts in zip(*pairs))
    assert 0 < apart <= 2**-8 * length


def test_groups_of_a_set_reward_are_made_on_each_process_and_evaluated_over_all(folder: Path):
    rewards = torch.stack([rank["rewards"][0] for rank in seen(folder, "sets")])  # two prompts' two images each
    assert torch.equal(rewards[:, ::2], rewards[:, 1::2])
    assert len(rewards.unique()) == 4
    assert tiny_runs.metrics(folder / "sets")[0]["eval/diversity/std"] > 0


def test_a_rank_without_images_takes_part_in_the_evaluation(folder: Path):
    first = tiny_runs.metrics(folder / "few_images")[0]
    assert first["eval/diversity"] > 0
    assert (folder / "few_images" / "grids" / "000001.png").exists()


def test_when_one_process_dies_the_other_saves_the_finished_iterations_and_ends_within_a_minute(
    tiny_lcm_folder: str, tmp_path: Path
):
    reward = {"name": "plugin_rewards:DiesOnRank1", "arguments": {"call": 4}}  # in the second iteration
    settings = {"prompts.num_prompts": 4, "rewards": [reward]}
    argv = tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)
    group = (2, run_processes.free_port())
    survivor, victim = (
        run_processes.start(run_processes.train, argv, log=tmp_path / f"{rank}.log", rank=rank, group=group)
        for rank in range(2)
    )
    victim.join(timeout=600)
    died = time.monotonic()
    assert victim.exitcode == 9
    survivor.join(timeout=60)
    assert time.monotonic() - died < 60
    assert survivor.exitcode == 1
    line = (tmp_path / "0.log").read_text().splitlines()[-1]
    assert line.startswith("error: another process of the run was lost (Connection ")
    assert line.endswith("; the 1 finished iterations are saved: go on with --resume latest")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["iteration_000001"]
