"""Malformed inputs of every kind, at the doors: one line each, in seconds, before weights load, and none accepted.

    python -m pytest -m slow tests/malformed -n 0 -s          all of them, with the table of docs/reliability.md

The tables are in tests/support/malformed/; test_malformed_folders.py has 160 more, damaged folders of models.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from malformed import Case, Outcome, Place, configs, data, plugins, runs, strange, tools, try_case

from rlcm_fast.prompts import sources
from rlcm_fast.train import main

pytestmark = pytest.mark.usefixtures("one_process")

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS: dict[str, Callable[[], list[Case]]] = {
    "options of a config": configs.configs,
    "numbers": configs.numbers,
    "YAML files": configs.yaml_files,
    "prompts": plugins.prompts,
    "rewards": plugins.rewards,
    "models by their path": data.models,
    "pairs of images": data.pairs,
    "archives and single files": data.archives,
    "checkpoints": runs.checkpoints,
    "flags of tools": tools.tools,
    "pipes, devices, other encodings": strange.files,
    "pictures": strange.pictures,
    "tools at pipes and devices": strange.tools,
}
AT_LEAST = 400


@pytest.fixture(scope="module")
def run(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with two checkpoints."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    assert main(tiny_runs.arguments(tiny_lcm_folder, folder, {"num_iterations": 2, "checkpoint.every": 1})) == 0
    return folder


@pytest.fixture
def attempt(
    run: Path, tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], Outcome]:
    """Tries a case in a folder of its own; functions of prompts have 4 seconds."""
    monkeypatch.setattr(sources, "SECONDS", 4.0)

    def work(case: Case) -> Outcome:
        return try_case(case, Place(tmp_path_factory.mktemp("case"), tiny_lcm_folder, run))

    return work


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_malformed_input_of_a_kind_ends_in_one_line(kind: str, attempt: Callable[[Case], Outcome]):
    outcomes = [attempt(case) for case in KINDS[kind]()]
    seconds = sorted(outcome.seconds for outcome in outcomes)
    late = sum(outcome.num_loads > 0 for outcome in outcomes)
    print(
        f"\n| {kind} | {len(outcomes)} | {sum(not outcome.problems for outcome in outcomes)} | {late} | "
        f"{seconds[len(seconds) // 2]:.2f} | {seconds[-1]:.1f} |"
    )
    assert [str(outcome) for outcome in outcomes if outcome.problems] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_of_a_kind_ends_in_one_line(kind: str, attempt: Callable[[Case], Outcome]):
    cases = KINDS[kind]()
    outcomes = [attempt(case) for case in cases[:: max(1, len(cases) // 3)][:3]]
    assert [str(outcome) for outcome in outcomes if outcome.problems] == []


def test_there_are_as_many_as_is_said():
    cases = [case for kind in KINDS.values() for case in kind()]
    assert len(cases) >= AT_LEAST
    assert len({(case.door, case.name) for case in cases}) == len(cases)


_SAMPLE = ["-m", "rlcm_fast.cli.main", "sample", "--model=shapes/lcm", "--prompt=a"]
PROCESSES = {
    "an unknown field": ["rlcm_fast/train.py", "--sed", "3"],
    "a reward of the wrong form": ["rlcm_fast/train.py", "--rewards", "[{name: malformed_plugins:OneArgument}]"],
    "a function that raises": ["rlcm_fast/train.py", "--prompts.source", "malformed_plugins:raises"],
    "a device that is none": [*_SAMPLE, "--device=banana"],
    "a number that is none": ["-m", "rlcm_fast.cli.main", "plan", "--reward-gib", "inf"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_a_process_of_its_own_says_one_line(name: str, tmp_path: Path):
    environment = tiny_runs.clean_environment(OMP_NUM_THREADS="1")
    argv = [str(ROOT / part) if part.endswith(".py") else part for part in PROCESSES[name]]
    done = subprocess.run(
        [sys.executable, *argv], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
