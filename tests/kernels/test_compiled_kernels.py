"""Our kernels compiled for sm_90 and traced, on a machine without a GPU: memory order, rounding, what Inductor sees."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.slow, pytest.mark.telling]  # 6 seconds in a process that does not interpret


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    script = ROOT / "tests" / "support" / "compiled_kernels.py"
    done = subprocess.run([sys.executable, script], check=True, env=environment, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("kernel", "num_counters"), [("_policy_kernel", 2), ("_log_prob_kernel", 1), ("_step_kernel", 1)]
)
def test_sums_are_published_before_a_program_counts_itself_and_read_after_it(
    document: dict[str, Any], kernel: str, num_counters: int
):
    """What arrival.py argues from: a barrier, one atomic of both halves for the whole GPU, a barrier, reads past L1."""
    wanted = r"st\.global|bar\.sync|atom\.\S+|ld\.global\.cg|ld\.shared"
    steps = re.findall(wanted, document["ptx"][kernel])
    atomics = [place for place, step in enumerate(steps) if step.startswith("atom.")]
    assert [steps[place] for place in atomics] == ["atom.global.gpu.acq_rel.add.u32"] * num_counters
    for place in atomics:
        assert steps[place - 1] == "bar.sync" and "st.global" in steps[:place]
        assert steps[place + 1 : place + 3] == ["bar.sync", "ld.shared"]
    assert "ld.global.cg" in steps[atomics[0] :] and "ld.global.cg" not in steps[: atomics[0]]


def test_no_kernel_rounds_otherwise_where_its_compiler_may_fuse(document: dict[str, Any]):
    """Inductor compiles with fused multiply-adds and eager calls without, so none may be left to fuse."""
    for name, plain, fusing in document["fused"]:
        assert plain == fusing and not any(fusing.values()), name


def test_a_compiler_sees_one_kernel_forward_and_one_backward_that_write_their_results_alone(document: dict[str, Any]):
    forward, backward = ([call for call in calls if call.startswith("kernel")] for calls in document["graphs"])
    assert forward == ["kernel writes scratch counters loss stats row_gradient"]
    assert backward == ["kernel writes out"]
