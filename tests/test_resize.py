"""A run that is resumed on another number of processes goes on with the same weights, moments, schedule and prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import resized_runs
import tiny_runs
import torch

from benchmarks.shared import run_processes

ENGINES: dict[str, dict[str, Any]] = {
    **{f"stage_{stage}": {"stage": stage} for stage in (0, 1, 2, 3)},
    **{f"bf16_{stage}": {"stage": stage, "dtype": "bf16"} for stage in (1, 2, 3)},
    "many_groups": {"stage": 3, "group_size": 2000},
    "direct": {"dtype": "pure_bf16", "name": "adamw_8bit"},
    "in_backward": {"name": "adamw_8bit", "in_backward": True},
    **{f"adapters_{stage}": {"stage": stage, "frozen": True} for stage in (0, 1, 2, 3)},
    **{f"old_{stage}": {"stage": stage, "old": True} for stage in (0, 1, 2, 3)},
    "old_many_groups": {"stage": 3, "group_size": 2000, "old": True},
    "old_bf16": {"stage": 1, "dtype": "bf16", "old": True},
    "adapters_in_backward": {"name": "adamw_8bit", "in_backward": True, "frozen": True},
}
QUICK = ("stage_1", "stage_3", "many_groups", "direct", "adapters_3")
EIGHT_BIT: dict[str, dict[str, Any]] = {
    "eight_bit": {"stage": 1, "name": "adamw_8bit"},
    "old_eight_bit": {"stage": 1, "name": "adamw_8bit", "old": True},
    "bitsandbytes": {"stage": 2, "name": "bnb_adamw_8bit"},
}

# 4 of the 5 prompts an iteration, so that a pass ends within the second; one image each.
SETTINGS: dict[str, Any] = {
    "prompts.num_prompts": 4,
    "prompts.images_per_prompt": 1,
    "update.micro_batch_size": 1,
    "num_iterations": 4,
}


def run(size: int, log_folder: Path, target: Callable[..., int], *values: Any) -> None:
    """`target(*values)` on `size` processes."""
    group = (size, run_processes.free_port())
    logs = [log_folder / f"{size}_{rank}.log" for rank in range(size)]
    processes = [run_processes.start(target, *values, log=log, rank=rank, group=group) for rank, log in enumerate(logs)]
    for process, log in zip(processes, logs):
        process.join(timeout=600)
        assert process.exitcode == 0, log.read_text()[-3000:]


def states(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=False)


def assert_same(values: Any, expected: Any) -> None:
    """Bitwise, whatever is nested in what."""
    if isinstance(expected, dict):
        assert values.keys() == expected.keys()
        for name in expected:
            assert_same(values[name], expected[name])
    elif isinstance(expected, torch.Tensor):
        assert values.dtype == expected.dtype
        assert torch.equal(values, expected)
    else:
        assert values == expected


def resize_engines(folder: Path, names: Iterable[str]) -> None:
    """Engines of 2 processes loaded by 1 and 4, and those of 1 (named one_...) loaded by 2."""
    engines = {name: ENGINES[name] for name in names}
    of_one = {f"one_{name}": settings for name, settings in engines.items()}
    run(2, folder, resized_runs.train_engines, folder, {**engines, **EIGHT_BIT})
    run(1, folder, resized_runs.train_and_load_engines, folder, of_one, engines)
    run(4, folder, resized_runs.load_engines, folder, engines)
    run(2, folder, resized_runs.load_engines, folder, {**of_one, **EIGHT_BIT})


def assert_engine_goes_on(folder: Path, name: str, size: int) -> None:
    saved, resumed = states(folder / f"{name}.pt"), states(folder / f"{name}_on_{size}.pt")
    assert saved["updates"] == 2
    assert len(saved) > 5 or "moments" in saved
    assert_same(resumed["loaded"], saved)
    assert resumed["after"]["updates"] == 3
    is_frozen = ENGINES[name.removeprefix("one_")].get("frozen", False)
    for weight, value in resumed["after"]["weights"].items():
        assert torch.equal(value, saved["weights"][weight]) == (is_frozen and weight.startswith("second."))


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engines")
    resize_engines(folder, QUICK)
    return folder


@pytest.mark.parametrize("name", QUICK)
def test_weights_moments_and_schedule_are_bitwise_those_of_the_checkpoint(name: str, engines: Path):
    assert_engine_goes_on(engines, name, 1)
    assert_engine_goes_on(engines, name, 4)
    assert_engine_goes_on(engines, f"one_{name}", 2)


@pytest.mark.slow
def test_so_they_are_with_the_other_engines(tmp_path: Path):
    others = [name for name in ENGINES if name not in QUICK]
    resize_engines(tmp_path, others)
    for name in others:
        assert_engine_goes_on(tmp_path, name, 1)
        assert_engine_goes_on(tmp_path, name, 4)
        assert_engine_goes_on(tmp_path, f"one_{name}", 2)


def test_8_bit_states_that_were_shared_out_go_on_on_as_many_processes(engines: Path):
    for name in EIGHT_BIT:
        saved, resumed = states(engines / f"{name}.pt"), states(engines / f"{name}_on_2.pt")
        assert_same(resumed["loaded"], saved)
        assert_same(resumed["after"], states(engines / f"{name}_after.pt"))


@pytest.mark.usefixtures("one_process")
def test_8_bit_states_that_were_shared_out_are_refused(engines: Path):
    with pytest.raises(ValueError, match="8-bit states in blocks, which another number of processes would cut; start"):
        resized_runs.load_engines(engines, EIGHT_BIT)


def resume_runs(stages: tuple[int, ...], sizes: tuple[int, ...], model: str, folder: Path, **more: Any) -> None:
    """Runs of 2 processes for an iteration, then of others for one more."""
    runs = {f"stage_{stage}": {**SETTINGS, **more, "engine.zero_stage": stage} for stage in stages}
    run(2, folder, resized_runs.run_to, 1, model, folder, runs)
    for size in sizes:
        resumed = {
            f"{name}_on_{size}": {**settings, "resume": folder / name / "checkpoints" / "iteration_000001"}
            for name, settings in runs.items()
        }
        run(size, folder, resized_runs.run_to, 2, model, folder, resumed)


def assert_goes_on(folder: Path, stage: int, size: int) -> None:
    first, second = states(folder / f"stage_{stage}.pt"), states(folder / f"stage_{stage}_on_{size}.pt")
    assert_same(second["loaded"], first["after"])
    assert_same(second["advantages"], first["advantages_after"])
    assert len(first["prompts"]) == len(second["prompts"]) == 4
    assert set(first["prompts"]) | set(second["prompts"]) == set(tiny_runs.PROMPTS), "a pass draws every prompt"
    assert len(set(second["prompts"])) == 4
    assert second["after"]["updates"] == 4


def test_a_run_of_two_processes_goes_on_as_one(tiny_lcm_folder: str, tmp_path: Path):
    resume_runs((1,), (1,), tiny_lcm_folder, tmp_path)
    assert_goes_on(tmp_path, 1, 1)


@pytest.mark.slow
@pytest.mark.telling
def test_a_run_of_two_processes_goes_on_as_one_and_as_four_at_every_stage(tiny_lcm_folder: str, tmp_path: Path):
    stages = (0, 1, 2, 3)
    resume_runs(stages, (1, 4), tiny_lcm_folder, tmp_path)
    for stage in stages:
        for size in (1, 4):
            assert_goes_on(tmp_path, stage, size)


@pytest.mark.slow
def test_so_it_does_with_adapters(tiny_lcm_folder: str, tmp_path: Path):
    stages = (0, 2, 3)
    resume_runs(stages, (1, 4), tiny_lcm_folder, tmp_path, **{"lora.rank": 2})
    for stage in stages:
        for size in (1, 4):
            assert_goes_on(tmp_path, stage, size)
