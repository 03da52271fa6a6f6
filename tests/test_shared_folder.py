"""Two processes that do not see the same config or folder end with one line; a killed run's lock is taken over."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import tiny_runs

from benchmarks.shared import run_processes


def train_apart(argv: list[str], folder: str) -> int:
    """Trains in a folder of this process's own, as a node with a disk of its own would, and waits for no one."""
    os.chdir(folder)
    from rlcm_fast.run_folder import agreement

    agreement.check_folder.__defaults__ = (0.5,)  # seconds; NFS gets more
    return run_processes.train(argv)


def ends_of(commands: list[list[str]], folders: list[Path]) -> list[tuple[int | None, str]]:
    """Runs a process for each command in its folder, all of one run; returns exit codes and what they said."""
    group, processes = (len(commands), run_processes.free_port()), []
    for rank, (argv, folder) in enumerate(zip(commands, folders, strict=True)):
        log = folder / f"{rank}.log"
        log.unlink(missing_ok=True)
        values = (train_apart, argv, str(folder))
        processes.append((run_processes.start(*values, log=log, rank=rank, group=group), log))
    for process, _ in processes:
        process.join(timeout=200)
    return [(process.exitcode, log.read_text()) for process, log in processes]


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.telling
def test_a_folder_that_is_not_shared_and_configs_that_differ_end_both_processes(tiny_lcm_folder: str, tmp_path: Path):
    nodes = [tmp_path / "node1", tmp_path / "node2"]
    for node in nodes:
        node.mkdir()
    argv = tiny_runs.arguments(tiny_lcm_folder, Path("run"))
    (first, said), (second, silent) = ends_of([argv, argv], nodes)
    assert (first, second) == (2, 2), said + silent
    assert lines_of(said)[0].startswith("error: run_dir=run is not shared: ")
    assert (len(lines_of(said)), lines_of(silent)) == (1, [])
    assert not (nodes[0] / "run").exists()

    (first, said), (second, silent) = ends_of([argv, [*argv, "--seed=1"]], [nodes[0], nodes[0]])
    assert (first, second) == (2, 2), said + silent
    assert lines_of(said)[0].startswith("error: the processes have different configs: seed=0 on rank 0 and 1 on rank 1")
    assert (len(lines_of(said)), lines_of(silent)) == (1, [])


@pytest.mark.slow
def test_a_killed_run_leaves_a_lock_that_the_next_takes_over(tiny_lcm_folder: str, tmp_path: Path):
    run_dir, log = tmp_path / "run", tmp_path / "log"
    settings = {"num_iterations": 10_000, "checkpoint.every": 1}
    process = run_processes.start(run_processes.train, tiny_runs.arguments(tiny_lcm_folder, run_dir, settings), log=log)
    deadline = time.monotonic() + 200
    while len(tiny_runs.metrics(run_dir)) < 3:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.01)
    process.kill()
    process.join()
    assert (run_dir / "lock").exists()
    more = {**settings, "num_iterations": len(tiny_runs.metrics(run_dir)) + 1, "resume": "latest"}
    process = run_processes.start(run_processes.train, tiny_runs.arguments(tiny_lcm_folder, run_dir, more), log=log)
    process.join(timeout=200)
    assert process.exitcode == 0, log.read_text()[-2000:]
    assert f"had the lock of process {os.getpid()}" not in log.read_text()
    assert "which is gone: the lock is taken over" in log.read_text()
