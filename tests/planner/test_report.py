"""What a run says of its memory; torch's view of a GPU is made up, the plan is real."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE
from types import SimpleNamespace

import pytest
import torch

from rlcm_fast.config import Config, parse_config
from rlcm_fast.planner import report
from rlcm_fast.planner.report import MemoryReport

GPU = torch.device("cuda", 0)
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of 24 GiB, of which 1 GiB was allocated at most."""
    state = SimpleNamespace(total_memory=24 * GIB, peak=GIB, resets=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: state)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    return state


def planned(monkeypatch: pytest.MonkeyPatch, update_gib: float) -> None:
    """In the place of 15 seconds of tracing."""
    plan = {"peak_bytes": {"decoding": GIB, "update": update_gib * GIB}, "bytes": {"overhead": GIB}}
    monkeypatch.setattr(report, "_start_plan", lambda config, file: SimpleNamespace())
    monkeypatch.setattr(report, "_read_plan", lambda process: (plan, ""))


def test_a_run_says_whether_it_fits_and_how_far_off_that_was(gpu: SimpleNamespace, monkeypatch):
    planned(monkeypatch, update_gib=13.0)
    memory, said = MemoryReport(Config(), GPU), []
    memory.verdict(said.append)
    memory.begin()
    gpu.peak = int(12.5 * GIB)
    assert memory.metrics() == {"memory/peak_gib": 12.5}
    memory.compare(said.append)
    memory.compare(said.append)  # once is enough
    assert said == [
        "plan: it fits, 13.0 of the GPU's 24.0 GiB, at the peak of update",
        "memory: 12.50 GiB allocated at the first iteration's peak, 12.00 planned (-4.0%)",
    ]


def test_a_run_that_is_too_large_is_told_so(gpu: SimpleNamespace, monkeypatch):
    planned(monkeypatch, update_gib=26.0)
    said: list[str] = []
    MemoryReport(Config(), GPU).verdict(said.append)
    assert said[0].startswith(
        "plan: it does not fit, 26.0 of the GPU's 24.0 GiB, at the peak of update; rlcm-fast plan"
    )


def test_a_cpu_has_no_plan():
    memory, said = MemoryReport(Config(), torch.device("cpu")), []
    memory.verdict(said.append)
    memory.begin()
    memory.compare(said.append)
    assert memory.metrics() == {}
    assert said == []


def test_a_plan_that_is_not_wanted_is_not_made(gpu: SimpleNamespace, monkeypatch):
    monkeypatch.setattr(report, "_start_plan", lambda config, file: pytest.fail("planned"))
    memory, said = MemoryReport(parse_config(["--tracking.plan=false"]), GPU), []
    memory.verdict(said.append)
    memory.compare(said.append)
    assert said == []
    assert memory.metrics() == {"memory/peak_gib": 1.0}


@pytest.mark.slow
@pytest.mark.telling
def test_the_plan_comes_from_a_process_of_its_own(gpu: SimpleNamespace, tmp_path: Path):
    config = parse_config(["--model.path=shapes/lcm", f"--run_dir={tmp_path}", "--update.micro_batch_size=16"])
    memory, said = MemoryReport(config, GPU), []
    memory.verdict(said.append)
    memory.compare(said.append)
    assert said[0].startswith("plan: it fits, 1.")
    assert "planned (" in said[1]


def test_a_plan_that_cannot_be_made_says_why(gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = "import sys; print('noise'); sys.exit('a warning\\nerror: model.path=some/model is not known')"
    failing = subprocess.Popen([sys.executable, "-c", code], stdout=PIPE, stderr=PIPE, text=True)
    monkeypatch.setattr(report, "_start_plan", lambda config, file: failing)
    config = parse_config(["--model.path=some/model", f"--run_dir={tmp_path}"])
    memory, said = MemoryReport(config, GPU), []
    memory.verdict(said.append)
    memory.compare(said.append)
    assert said == ["no plan of the memory: model.path=some/model is not known"]
