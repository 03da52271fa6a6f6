"""What other_tools.py calls a fault, and that the results that are kept have none."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compatibility.other_tools import EXPECTED, faults_of
from benchmarks.shared.reporting import ROOT

KEPT = ROOT / "benchmarks" / "results" / "other_tools.json"


@pytest.fixture
def report() -> dict[str, Any]:
    return json.loads(KEPT.read_text(encoding="utf-8"))


def test_the_kept_results_have_no_fault(report: dict[str, Any]):
    assert faults_of(report) == report["faults"] == []
    assert report["InvokeAI"].keys() == EXPECTED.keys()
    applied = report["stable-diffusion.cpp"]["lora_tensors_applied"]
    assert applied == ["384 / 384"], "128 layers of down, up and alpha"


@pytest.mark.parametrize("kind", ["tensors_missing", "tensors_unknown", "lora_tensors_unused"])
def test_a_key_that_a_tool_does_not_know_is_a_fault(kind: str, report: dict[str, Any]):
    changed = copy.deepcopy(report)
    changed["stable-diffusion.cpp"][kind] = ["a.weight"]
    assert faults_of(changed) == [f"stable-diffusion.cpp: {kind}: a.weight"]


def test_another_image_and_another_kind_are_faults(report: dict[str, Any]):
    drawn, name = report["stable-diffusion.cpp"], Path(next(iter(EXPECTED))).name
    drawn["differs_from_diffusers"]["with LoRA"] = drawn["lora_changes"]
    report["InvokeAI"][name]["base"] = "sdxl"
    faults = faults_of(report)
    assert len(faults) == 2 and "the image with LoRA differs by" in faults[0] and name in faults[1]
    assert faults_of({**report, "InvokeAI": {"failed": "why"}})[0] == "InvokeAI failed"
