"""Runs that are killed, interrupted and resumed equal a run that was left alone, bitwise.

The signals are real ones to real processes; `uninterrupted` goes through `python rlcm_fast/train.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

import rlcm_fast
from benchmarks.shared import run_processes
from rlcm_fast.config import parse_config

NUM_ITERATIONS = 10
SETTINGS: dict[str, object] = {
    "num_iterations": NUM_ITERATIONS,
    "rewards": [{"name": "plugin_rewards:Slow", "arguments": {"seconds": 0.02}}],  # leaves time for a signal
    "checkpoint.every": 2,
    "evaluation.every": 3,
    "update.kl_weight": 0.1,
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """In all processes: sums over threads round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def uninterrupted(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was left alone."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    script = Path(rlcm_fast.__file__).parent / "train.py"  # type: ignore[arg-type]
    command = [sys.executable, str(script), *tiny_runs.arguments(tiny_lcm_folder, run_dir, SETTINGS)]
    environment = tiny_runs.clean_environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "export is a diffusers folder" in done.stderr
    # A run's first words are its own.
    sampler = "sampling: consistency, timesteps 999 679 339 (policy.kind=auto)"
    first = ["rewards built: plugin_rewards:Slow", f"loading {tiny_lcm_folder}", sampler]
    assert done.stderr.splitlines()[:4] == [*first, "first iteration: number 1 of 10, 4 images"]
    assert f"\nfirst iteration: number 1 of {NUM_ITERATIONS}, 4 images\n" in done.stderr.replace("\r", "\n")
    assert done.stdout == ""
    return run_dir


def assert_equal_runs(run_dir: Path, other: Path) -> None:
    """Metrics (times aside), final weights, and all else that a further resume would start from."""
    assert tiny_runs.metrics(run_dir) == tiny_runs.metrics(other)
    last = f"checkpoints/iteration_{NUM_ITERATIONS:06d}"
    assert (run_dir / last / "state.json").read_text() == (other / last / "state.json").read_text()
    weights, expected = (load_file(folder / last / "unet.safetensors") for folder in (run_dir, other))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    # All that the engine saved: master weights, moments, step counts, and which of them there are.
    for name in ("weights", "states"):
        file = f"{last}/engine/{name}_00000_of_00001.safetensors"
        saved, expected = (load_file(folder / file) for folder in (run_dir, other))
        assert saved.keys() == expected.keys()
        assert all(torch.equal(saved[name], expected[name]) for name in expected)
    shard = f"{last}/engine/shard_00000_of_00001.json"
    assert (run_dir / shard).read_text() == (other / shard).read_text()


def wait_for_lines(process: BaseProcess, run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(tiny_runs.metrics(run_dir)) < count:
        assert process.is_alive() and time.monotonic() < deadline, f"no {count} lines from {process}"
        time.sleep(0.002)


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


@pytest.mark.slow
@pytest.mark.telling
def test_a_run_killed_and_interrupted_again_and_again_equals_one_left_alone(
    tiny_lcm_folder: str, tmp_path: Path, uninterrupted: Path
):
    run_dir, log = tmp_path / "run", tmp_path / "log"

    def start(resume: bool = True, **more: object) -> BaseProcess:
        argv = tiny_runs.arguments(tiny_lcm_folder, run_dir, {**SETTINGS, **more})
        return run_processes.start(run_processes.train, [*argv, *["--resume=latest"] * resume], log=log)

    def signalled(process: BaseProcess, number: int, at_line: int) -> int | None:
        wait_for_lines(process, run_dir, at_line)
        assert process.pid is not None
        os.kill(process.pid, number)
        process.join(timeout=100)
        return process.exitcode

    # Killed before the first checkpoint: the same command begins anew. Killed after it.
    assert signalled(start(resume=False), signal.SIGKILL, at_line=1) == -signal.SIGKILL
    assert signalled(start(), signal.SIGKILL, at_line=3) == -signal.SIGKILL
    assert "ended before its first checkpoint: starting at 0; its metrics are in metrics.jsonl.1" in log.read_text()
    assert "which is gone: the lock is taken over" in log.read_text()
    assert "iteration_000002" in checkpoints(run_dir)

    # Killed while it writes a checkpoint: the half of it is not taken for one.
    process = start(**{"evaluation.rewards": [{"name": "plugin_rewards:KilledWhileSaving"}]})
    process.join(timeout=300)
    assert process.exitcode == -signal.SIGKILL
    assert [name for name in checkpoints(run_dir) if name.startswith(".partial")]

    # Asked to stop: saves and exits cleanly.
    for number in (signal.SIGTERM, signal.SIGINT):
        before = len(tiny_runs.metrics(run_dir))
        process = start()
        assert signalled(process, number, at_line=before + 1) == 0, log.read_text()[-3000:]
        finished = len(tiny_runs.metrics(run_dir))
        assert finished < NUM_ITERATIONS
        assert f"stopped after {finished} iterations; go on with --resume latest" in log.read_text()
        assert checkpoints(run_dir)[-1] == f"iteration_{finished:06d}"

    process = start()
    process.join(timeout=300)
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert_equal_runs(run_dir, uninterrupted)
    assert checkpoints(run_dir)[-2:] == ["iteration_000008", "iteration_000010"]


SLOWER = [{"name": "plugin_rewards:Slow", "arguments": {"seconds": 0.5}}]  # all signals come in one iteration
ENDLESS: dict[str, object] = {**SETTINGS, "num_iterations": 10_000, "rewards": SLOWER}


def assert_stopped_with_a_checkpoint(run_dir: Path, said: str) -> None:
    finished = len(tiny_runs.metrics(run_dir))
    assert f"stopped after {finished} iterations; go on with --resume latest" in said
    assert checkpoints(run_dir)[-1] == f"iteration_{finished:06d}"


def test_two_processes_that_are_interrupted_and_told_to_end_save_a_checkpoint(tiny_lcm_folder: str, tmp_path: Path):
    """A terminal's SIGINT reaches both, the one a little after the other, and a launcher sends SIGTERM after it."""
    argv = tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", ENDLESS)
    logs, group = [tmp_path / f"{rank}.log" for rank in range(2)], (2, run_processes.free_port())
    processes = [
        run_processes.start(run_processes.train, argv, log=log, rank=rank, group=group) for rank, log in enumerate(logs)
    ]
    wait_for_lines(processes[0], tmp_path / "run", 2)
    time.sleep(0.1)  # the checkpoint of iteration 2 is written, and iteration 3 has begun
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in processes:
            assert process.pid is not None
            os.kill(process.pid, number)
            time.sleep(0.05)
    for process, log in zip(processes, logs):
        process.join(timeout=100)
        assert process.exitcode == 0, log.read_text()[-3000:]
    assert_stopped_with_a_checkpoint(tmp_path / "run", logs[0].read_text())


@pytest.mark.slow
@pytest.mark.telling
def test_ctrl_c_under_the_launcher_saves_a_checkpoint(tiny_lcm_folder: str, tmp_path: Path):
    """The terminal's SIGINT reaches all processes of the group, and the launcher sends SIGTERM after it."""
    run_dir, log = tmp_path / "run", tmp_path / "log"
    launcher = [
        str(Path(sys.executable).with_name("deepspeed")),
        "--num_accelerators=2",
        f"--master_port={run_processes.free_port()}",
    ]
    script = str(Path(rlcm_fast.__file__).parent / "train.py")  # type: ignore[arg-type]
    command = [*launcher, script, *tiny_runs.arguments(tiny_lcm_folder, run_dir, ENDLESS)]
    environment = tiny_runs.clean_environment(OMP_NUM_THREADS="1")
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while len(tiny_runs.metrics(run_dir)) < 2:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert_stopped_with_a_checkpoint(run_dir, log.read_text())


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("moment", ["rollout", "update"])
def test_a_stop_in_the_middle_of_an_iteration_undoes_it_and_the_resumed_run_does_it_again(
    moment: str, tiny_lcm_folder: str, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlcm_fast.trainer import Trainer

    config = parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", SETTINGS))
    trainer = Trainer(config)
    # An iteration decodes 2 micro-batches and runs 4 backward passes; the evaluation before the first decodes 2, too.
    part, name, at_call = {
        "rollout": (trainer.images.backbone, "decode", 2 + 2 + 1),
        "update": (trainer.engine, "backward", 4 + 1),
    }[moment]
    original, calls = getattr(part, name), []

    def and_signal(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == at_call:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    monkeypatch.setattr(part, name, and_signal)
    trainer.run()
    assert trainer.iteration == 1
    assert checkpoints(tmp_path / "run") == ["iteration_000001"]
    Trainer(replace(config, resume="latest")).run()
    assert_equal_runs(tmp_path / "run", uninterrupted)
