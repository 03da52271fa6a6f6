"""Every kernel compiled for real architectures, on a machine without a GPU: no spills, whole rows in 16-byte loads."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# of latents, which a kernel loads
TENSORS = {
    "log_prob": 3,
    "log_prob, guided": 4,
    "gradient": 3,
    "gradient, known": 3,
    "step": 3,
    "step, guided, seeds": 3,
    "policy_loss": 3,
    "policy_loss, guided": 4,
    "policy_loss, on-policy": 3,
}
# of group_norm_silu: whole tensors, elements of each in a program's registers, statistics gathered for each channel
NORM = {
    "statistics_kernel": (1, 4096, 0),
    "normalise_kernel": (1, 2048, 2),
    "sums_kernel": (2, 1024, 2),
    "input_gradient_kernel": (2, 1024, 4),
}
ARCHITECTURES = {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"}


@pytest.fixture(scope="module", params=[pytest.param("80", marks=pytest.mark.slow), "120"])
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The oldest and the newest architecture, compiled now: ten seconds each."""
    out = tmp_path_factory.mktemp("kernels") / "resources.csv"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = ROOT / "benchmarks" / "kernels" / "kernel_resources.py"
    command = [sys.executable, script, "--architectures", request.param, "--out", out]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    rows = rows_of(out)
    assert {row["architecture"] for row in rows} == {f"sm_{request.param}"}
    return rows


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_no_kernel_spills(compiled: list[dict[str, str]]):
    assert all(row["spilled_bytes"] == "0" for row in compiled)
    of_tensors = [row for row in compiled if row["operation"] in TENSORS]
    assert {row["operation"] for row in of_tensors} == TENSORS.keys()
    assert max(int(row["registers"]) for row in of_tensors) <= 80  # six programs of 128 threads a multiprocessor
    of_norms = [row for row in compiled if row["operation"].startswith("group_norm_silu")]
    assert {row["kernel"] for row in of_norms} == NORM.keys() | {"merge_kernel", "merge_sums_kernel"}
    assert max(int(row["registers"]) for row in of_norms) <= 96  # five


def test_rows_come_in_by_vector_loads_and_only_coefficients_by_narrow_ones(compiled: list[dict[str, str]]):
    for row in compiled:
        if row["operation"] in TENSORS:
            loads_a_tensor = 1024 * (4 if row["dtype"] == "float32" else 2) // (128 * 16)
            assert int(row["vector_loads"]) == TENSORS[row["operation"]] * loads_a_tensor, row
            assert int(row["narrow_loads"]) <= 8, row


def test_weights_and_gradients_come_in_by_vector_loads_and_moments_by_half_as_wide_ones(compiled: list[dict[str, str]]):
    rows = [row for row in compiled if row["operation"] == "adamw_8bit"]
    assert {(row["dtype"], row["vector_loads"]) for row in rows} == {("float32", "4"), ("bfloat16", "2")}
    assert max(int(row["registers"]) for row in rows) <= 96  # 64 with triton 3.7, 96 with 3.6: five programs or more


def test_sums_of_gradients_come_in_by_vector_loads_and_the_step_and_the_number_by_two(compiled: list[dict[str, str]]):
    rows = [row for row in compiled if row["operation"] == "add_rounded"]
    loads = {(row["dtype"], row["vector_loads"], row["narrow_loads"]) for row in rows}
    assert loads == {("bfloat16", "2", "2")}
    assert max(int(row["registers"]) for row in rows) <= 40


def test_hidden_states_of_a_unet_come_in_by_vector_loads_in_either_format(compiled: list[dict[str, str]]):
    for row in compiled:
        if row["kernel"] in NORM:
            num_tensors, elements, gathered = NORM[row["kernel"]]
            of_tensors = num_tensors * elements * (4 if row["dtype"] == "float32" else 2) // (128 * 16)
            of_parameters = 2 if gathered else 0  # weight and bias, where a thread has several channels
            assert of_tensors <= int(row["vector_loads"]) <= of_tensors + of_parameters, row
            assert int(row["narrow_loads"]) <= 8 * gathered, row


def test_the_committed_table_is_of_these_kernels_and_all_architectures(compiled: list[dict[str, str]]):
    committed = rows_of(ROOT / "benchmarks" / "results" / "kernel_resources.csv")
    assert {row["architecture"] for row in committed} == ARCHITECTURES
    keys = ("operation", "kernel", "architecture", "dtype", "format")
    named = {tuple(row[key] for key in keys) for row in committed}
    assert {tuple(row[key] for key in keys) for row in compiled} <= named
    assert all(row["spilled_bytes"] == "0" for row in committed)
