"""Runs that are killed at random moments, again and again, and runs whose disk or files fail: they resume bitwise.

python -m pytest -m slow tests/test_crashes.py -n 0 -s     prints what was done; docs/reliability.md has the numbers
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from benchmarks.shared import run_processes

pytestmark = pytest.mark.slow
NUM_ITERATIONS = 60
NUM_KILLS, NUM_KILLS_OF_A_RANK, NUM_DAMAGES = 50, 10, 12
SETTINGS: dict[str, object] = {
    "num_iterations": NUM_ITERATIONS,
    "checkpoint.every": 1,
    "evaluation.every": 7,
    "update.kl_weight": 0.1,
    "optimizer.warmup_updates": 2,
    "ema.decay": 0.9,
    "optimizer.final_lr_fraction": 1.0,  # runs may begin with fewer iterations
}


def run_in(folder: Path, model: str, **more: object) -> list[str]:
    return tiny_runs.arguments(model, folder / "run", {**SETTINGS, **more})


def start(argv: Sequence[str], folder: Path, rank: int = 0, group: tuple[int, int] | None = None) -> BaseProcess:
    return run_processes.start(run_processes.train, list(argv), log=folder / f"{rank}.log", rank=rank, group=group)


def start_two(argv: Sequence[str], folder: Path) -> list[BaseProcess]:
    group = (2, run_processes.free_port())
    return [start(argv, folder, rank, group) for rank in range(2)]


def finish(argv: Sequence[str], folder: Path, num_processes: int = 1) -> None:
    processes = [start(argv, folder)] if num_processes == 1 else start_two(argv, folder)
    for process in processes:
        process.join(timeout=600)
        assert process.exitcode == 0, (folder / "0.log").read_text()[-3000:]


def last_checkpoint(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / f"iteration_{NUM_ITERATIONS:06d}"


def assert_equal(folder: Path, other: Path) -> None:
    """Compares the metrics (times aside) and every tensor and number of the last checkpoint."""
    assert tiny_runs.metrics(folder / "run") == tiny_runs.metrics(other / "run")
    files = sorted(path.relative_to(last_checkpoint(other)) for path in last_checkpoint(other).rglob("*.safetensors"))
    assert files
    for file in files:
        tensors, expected = (load_file(last_checkpoint(of) / file) for of in (folder, other))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected), file


def kill_at_random(process: BaseProcess, run_dir: Path, chance: random.Random) -> None:
    """Kills the process while it starts, or at some moment of its next three iterations."""
    if chance.random() < 0.2:
        time.sleep(chance.uniform(0, 2))
    else:
        before, wanted = len(tiny_runs.metrics(run_dir)), chance.randint(1, 3)
        deadline = time.monotonic() + 120
        while len(tiny_runs.metrics(run_dir)) != before + wanted and process.is_alive():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.3))
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)


def assert_ends_without_the_other(process: BaseProcess, run_dir: Path) -> None:
    """One that was killed before both had met leaves the other waiting, as a launcher finds it: it is killed, too."""
    finished = len(tiny_runs.metrics(run_dir))
    process.join(timeout=60)
    if process.exitcode is None:
        assert len(tiny_runs.metrics(run_dir)) == finished, "a rank went on without the other"
        process.kill()
        process.join()
    assert process.exitcode != 0


def to_resume(run_dir: Path) -> list[str]:
    """Returns what a next start needs; a run that was killed before its first checkpoint, but with metrics, is gone."""
    if tiny_runs.metrics(run_dir) and not list((run_dir / "checkpoints").glob("iteration_*")):
        shutil.rmtree(run_dir)
    return ["--resume=latest"] if (run_dir / "metrics.jsonl").exists() else []


@pytest.fixture(scope="module")
def alone(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that was left alone."""
    folder = tmp_path_factory.mktemp("alone")
    finish(run_in(folder, tiny_lcm_folder), folder)
    return folder


def test_fifty_random_kills_lose_nothing(tiny_lcm_folder: str, tmp_path: Path, alone: Path):
    chance, num_kills, finished = random.Random(0), 0, []
    argv = run_in(tmp_path, tiny_lcm_folder)
    resumed: list[str] = []
    while num_kills < NUM_KILLS:
        if len(tiny_runs.metrics(tmp_path / "run")) >= NUM_ITERATIONS - 4:  # too near the end to be killed again
            finish([*argv, *resumed], tmp_path)
            assert_equal(tmp_path, alone)
            shutil.rmtree(tmp_path / "run")
            resumed = []
        process = start([*argv, *resumed], tmp_path)
        kill_at_random(process, tmp_path / "run", chance)
        num_kills += process.exitcode == -signal.SIGKILL
        finished.append(len(tiny_runs.metrics(tmp_path / "run")))
        resumed = to_resume(tmp_path / "run")
    finish([*argv, *resumed], tmp_path)
    assert_equal(tmp_path, alone)
    print(f"{num_kills} kills, after iterations {finished}: metrics and checkpoint bitwise equal")


def test_ten_random_kills_of_one_of_two_processes_lose_nothing(tiny_lcm_folder: str, tmp_path: Path):
    chance, two = random.Random(1), {"engine.zero_stage": 1, "num_iterations": NUM_ITERATIONS}
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
    finish(run_in(alone, tiny_lcm_folder, **two), alone, num_processes=2)

    argv, resumed, num_kills = run_in(killed, tiny_lcm_folder, **two), [], 0
    while num_kills < NUM_KILLS_OF_A_RANK:
        processes = start_two([*argv, *resumed], killed)
        victim, other = chance.sample(processes, 2)
        kill_at_random(victim, killed / "run", chance)
        assert_ends_without_the_other(other, killed / "run")
        num_kills += 1
        resumed = to_resume(killed / "run")
    finish([*argv, *resumed], killed, num_processes=2)
    assert_equal(killed, alone)
    print(f"{num_kills} kills of one of two processes under ZeRO-1: metrics and checkpoint bitwise equal")


def _train_with_little_disk(argv: list[str], num_bytes: int) -> int:
    """Trains in a process that may write no file larger than `num_bytes`, as on a disk that fills."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))
    return run_processes.train(argv)


def test_a_disk_that_fills_loses_nothing(tiny_lcm_folder: str, tmp_path: Path, alone: Path):
    chance, argv, run_dir = random.Random(2), run_in(tmp_path, tiny_lcm_folder), tmp_path / "run"
    for num_bytes in (20_000, 100_000):
        process = start([*argv, *to_resume(run_dir)], tmp_path)
        kill_at_random(process, run_dir, chance)
        log, resumed = tmp_path / f"{num_bytes}.log", to_resume(run_dir)
        process = run_processes.start(_train_with_little_disk, [*argv, *resumed], num_bytes, log=log)
        process.join(timeout=120)
        assert process.exitcode == 1
        assert log.read_text().splitlines()[-1].startswith("error: ")
    finish([*argv, *to_resume(run_dir)], tmp_path)
    assert_equal(tmp_path, alone)


def test_a_checkpoint_that_is_damaged_at_random_falls_back_to_the_one_before(
    tiny_lcm_folder: str, tmp_path: Path, alone: Path
):
    chance = random.Random(3)
    finish(run_in(tmp_path, tiny_lcm_folder, num_iterations=6), tmp_path)
    argv = [*run_in(tmp_path, tiny_lcm_folder), "--resume=latest"]
    damages = []
    for _ in range(NUM_DAMAGES):
        newest = max((tmp_path / "run" / "checkpoints").glob("iteration_*"))
        file = chance.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        damage = chance.choice(["truncate", "empty", "remove"])
        damages.append(f"{file.name} {damage}")
        if damage == "remove":
            file.unlink()
        else:
            os.truncate(file, 0 if damage == "empty" else chance.randrange(file.stat().st_size))
        process = start(argv, tmp_path)
        kill_at_random(process, tmp_path / "run", chance)
    finish(argv, tmp_path)
    assert_equal(tmp_path, alone)
    assert "is damaged" in (tmp_path / "0.log").read_text()
    print(f"damaged: {', '.join(damages)}")


def test_of_two_starts_at_once_one_trains_and_the_other_says_so(tiny_lcm_folder: str, tmp_path: Path, alone: Path):
    for resumed in ([], ["--resume=latest"]):
        more = {"num_iterations": 10} if not resumed else {}
        argv = [*run_in(tmp_path, tiny_lcm_folder, **more), *resumed]
        processes = [
            run_processes.start(run_processes.train, argv, log=tmp_path / f"{len(resumed)}_{number}.log")
            for number in range(2)
        ]
        for process in processes:
            process.join(timeout=300)
        assert sorted(process.exitcode or 0 for process in processes) == [0, 2]
    assert_equal(tmp_path, alone)
