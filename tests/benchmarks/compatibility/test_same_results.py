"""The comparison of two trees: it finds what differs between two run folders, and its cases are valid configs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.compatibility.run_differences import first_difference
from benchmarks.compatibility.same_results import chosen_cases, full_commit
from benchmarks.compatibility.training_cases import CASES, Case
from rlcm_fast.config import parse_config
from rlcm_fast.config.checks import validate

CHECKPOINT = "checkpoints/iteration_000002"
LINES: list[dict[str, Any]] = [
    {"iteration": 0, "loss": 0.1, "seconds/update": 1.5, "images_per_second": 20.0, "memory/peak_gib": 1.0},
    {"iteration": 1, "loss": float("nan"), "seconds/update": 1.25, "images_per_second": 30.0},
]


def write_lines(run_dir: Path, lines: list[dict[str, Any]]) -> None:
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_state(run_dir: Path, **state: Any) -> None:
    (run_dir / CHECKPOINT / "state.json").write_text(json.dumps(state))


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal run folders."""
    old, new = tmp_path / "old", tmp_path / "new"
    weights = {
        "bias": torch.tensor([1.0, float("nan")]),
        "weight": torch.arange(6.0).view(2, 3),
        "scale": torch.ones(()),
    }
    for folder in ("export/unet", CHECKPOINT, "grids"):
        (old / folder).mkdir(parents=True)
    save_file(weights, old / "export" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(weights, old / CHECKPOINT / "ema.safetensors")
    (old / "grids" / "000000.png").write_bytes(b"picture")
    write_lines(old, LINES)
    write_state(old, iteration=2, tasks={"statistics": {"a red circle": [0.5, 0.25]}})
    shutil.copytree(old, new)
    return old, new


def change_weight(path: Path, name: str, value: torch.Tensor) -> None:
    save_file({**load_file(path), name: value}, path)


def test_equal_runs_have_no_difference(folders: tuple[Path, Path]):
    assert first_difference(*folders) == ""


def test_times_and_memory_are_no_difference(folders: tuple[Path, Path]):
    old, new = folders
    times = {"seconds/update": 9.0, "images_per_second": 1.0, "memory/peak_gib": 2.0, "seconds/elsewhere": 3.0}
    write_lines(new, [{**line, **times} for line in LINES])
    assert first_difference(old, new) == ""


def test_another_time_of_a_models_file_is_no_difference_but_another_size_or_hash_is(folders: tuple[Path, Path]):
    old, new = folders
    name = "unet/diffusion_pytorch_model.safetensors"
    file = {"size": 10, "mtime_ns": 1, "header": "ab", "sha256": "cd"}

    def write(run_dir: Path, **changes: Any) -> None:
        write_state(run_dir, iteration=2, trained_with={"model": {"pipeline": {name: {**file, **changes}}}})

    write(old)
    write(new, mtime_ns=2)
    assert first_difference(old, new) == ""
    for key, value in (("size", 11), ("header", "xy"), ("sha256", "xy")):
        write(new, mtime_ns=2, **{key: value})
        assert first_difference(old, new).endswith(f"{name}.{key} was {file[key]}, now {value}")


def test_a_metric_that_changed_in_its_last_digit_is_found_with_both_values(folders: tuple[Path, Path]):
    old, new = folders
    write_lines(new, [{**LINES[0], "loss": 0.10000000000000002}, LINES[1]])
    assert first_difference(old, new) == "metrics.jsonl, line 1: loss was 0.1, now 0.10000000000000002"


def test_a_metric_that_is_missing_or_new_is_found(folders: tuple[Path, Path]):
    old, new = folders
    write_lines(new, [LINES[0], {"iteration": 1}])
    assert first_difference(old, new) == "metrics.jsonl, line 2: loss was nan, now (missing)"
    assert first_difference(new, old) == "metrics.jsonl, line 2: loss was (missing), now nan"


def test_a_missing_line_is_found(folders: tuple[Path, Path]):
    old, new = folders
    write_lines(new, LINES[:1])
    assert first_difference(old, new) == "metrics.jsonl has 2 lines, now 1"


def test_a_weight_that_changed_by_one_bit_is_found_with_both_values(folders: tuple[Path, Path]):
    old, new = folders
    path = new / "export" / "unet" / "diffusion_pytorch_model.safetensors"
    weight = torch.arange(6.0).view(2, 3)
    weight[1, 1] = 4.0 + 2**-21
    change_weight(path, "weight", weight)
    assert first_difference(old, new) == (
        "export/unet/diffusion_pytorch_model.safetensors: weight differs in 1 of 6 numbers, the first at 4: was 4.0, "
        "now 4.000000476837158"
    )


def test_a_scalar_weight_another_type_and_a_missing_weight_are_found(folders: tuple[Path, Path]):
    old, new = folders
    path = new / CHECKPOINT / "ema.safetensors"
    change_weight(path, "scale", torch.zeros(()))
    assert first_difference(old, new).endswith("scale differs in 1 of 1 numbers, the first at 0: was 1.0, now 0.0")
    change_weight(path, "scale", torch.ones((), dtype=torch.float64))
    assert first_difference(old, new).endswith("scale was () torch.float32, now () torch.float64")
    save_file({"bias": load_file(path)["bias"]}, path)
    assert first_difference(old, new) == f"{CHECKPOINT}/ema.safetensors: scale is missing"


def test_a_file_that_is_missing_or_new_is_found(folders: tuple[Path, Path]):
    old, new = folders
    (new / CHECKPOINT / "ema.safetensors").unlink()
    assert first_difference(old, new) == f"{CHECKPOINT}/ema.safetensors is missing"
    assert first_difference(new, old) == f"{CHECKPOINT}/ema.safetensors is new"


def test_a_changed_state_is_found_and_a_new_key_in_it_is_none(folders: tuple[Path, Path]):
    old, new = folders
    write_state(new, iteration=2, tasks={"statistics": {"a red circle": [0.5, 0.25]}}, more=1)
    assert first_difference(old, new) == ""
    write_state(new, iteration=2, tasks={"statistics": {"a red circle": [0.5, 0.75]}})
    place = "tasks.statistics.a red circle"
    assert first_difference(old, new) == f"{CHECKPOINT}/state.json: {place} was [0.5, 0.25], now [0.5, 0.75]"
    write_state(new, iteration=2)
    assert first_difference(old, new) == f"{CHECKPOINT}/state.json: {place} was [0.5, 0.25], now (missing)"


def test_shards_are_compared_if_both_runs_have_them(folders: tuple[Path, Path]):
    """Before them there were pickles, which are not compared."""
    old, new = folders
    shards = [folder / CHECKPOINT / "engine" / "weights_00000_of_00001.safetensors" for folder in (new, old)]
    for shard, value in zip(shards, (1.0, 2.0)):
        assert first_difference(old, new) == ""
        shard.parent.mkdir()
        save_file({"a": torch.full((1,), value)}, shard)
    assert "weights_00000_of_00001.safetensors: a differs in 1 of 1 numbers" in first_difference(old, new)


def test_another_picture_is_found(folders: tuple[Path, Path]):
    old, new = folders
    (new / "grids" / "000000.png").write_bytes(b"another")
    assert first_difference(old, new) == "grids/000000.png is another picture"


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_case_is_a_valid_config(case: Case, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[3])
    validate(parse_config(case.options()), case.processes)


def test_a_case_or_commit_that_is_none_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="only=resum is no case; the cases are compressibility, alignment, "):
        chosen_cases(["resum"])
    with pytest.raises(ValueError, match="commit=nothing is no commit of this repository; name one of `git log`"):
        full_commit("nothing")
