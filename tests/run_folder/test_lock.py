"""One run writes into a run folder; a lock whose holder is gone is taken over, and said."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlcm_fast.run_folder import lock as locks
from rlcm_fast.run_folder.lock import DEAD_AFTER, take, token_in


def hold(run_dir: Path, **holder: Any) -> Path:
    """Leaves a lock as another process would have written it."""
    run_dir.mkdir(exist_ok=True)
    path = run_dir / "lock"
    path.write_text(json.dumps({**locks._machine(), **locks._process(), "token": "theirs", **holder}))
    return path


@pytest.fixture
def other_process() -> Any:
    """A process that lives until the test ends."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield psutil.Process(process.pid)
    process.communicate(b"\n")


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_held_lock_names_its_process_and_goes_with_it(tmp_path: Path):
    lock = take(tmp_path / "run", print)
    holder = json.loads((tmp_path / "run" / "lock").read_text())
    assert holder["pid"] == os.getpid()
    assert holder.keys() == {"pid", "process_start", "host", "boot", "pid_namespace", "since", "token"}
    assert token_in(tmp_path / "run") == lock.token
    lock.release()
    assert not (tmp_path / "run").exists(), "a folder that was made for the lock and stayed empty goes too"
    assert token_in(tmp_path / "run") is None


def test_a_folder_that_was_there_stays(tmp_path: Path):
    take(tmp_path, print).release()
    assert tmp_path.is_dir()


def test_a_lock_that_nothing_refers_to_is_released(tmp_path: Path):
    lock: Any = take(tmp_path, print)
    del lock
    gc.collect()
    assert not (tmp_path / "lock").exists()


def test_a_living_holder_on_this_machine_is_refused_however_silent_it_is(tmp_path: Path, other_process: Any):
    path = hold(tmp_path, pid=other_process.pid, process_start=other_process.create_time())
    age(path, 10 * DEAD_AFTER)
    with pytest.raises(ValueError, match=f"run_dir={tmp_path} is in use by process {other_process.pid} on .*; wait"):
        take(tmp_path, print)
    assert token_in(tmp_path) == "theirs"


@pytest.mark.parametrize("is_reused", [False, True])
def test_a_holder_that_is_gone_is_taken_over_at_once(tmp_path: Path, other_process: Any, is_reused: bool):
    """Its process id is free, or belongs to a process that started at another time."""
    gone = {"pid": other_process.pid, "process_start": other_process.create_time() - 3600} if is_reused else {}
    hold(tmp_path, **({"pid": 2**22 + 1} | gone))
    said: list[str] = []
    lock = take(tmp_path, said.append)
    assert token_in(tmp_path) == lock.token != "theirs"
    assert len(said) == 1
    assert said[0].endswith("which is gone: the lock is taken over")


@pytest.mark.parametrize("elsewhere", [{"host": "node7"}, {"boot": "another"}, {"pid_namespace": 1}])
def test_of_another_machine_only_the_heartbeat_tells(tmp_path: Path, elsewhere: dict[str, Any]):
    path = hold(tmp_path, **elsewhere)
    with pytest.raises(ValueError, match=f"rm {tmp_path}/lock"):
        take(tmp_path, print)
    age(path, DEAD_AFTER + 1)
    said: list[str] = []
    take(tmp_path, said.append)
    assert len(said) == 1


def test_a_lock_that_cannot_be_read_counts_as_held_until_it_is_old(tmp_path: Path):
    (tmp_path / "lock").touch()
    with pytest.raises(ValueError, match="is in use by an unknown process"):
        take(tmp_path, print)
    age(tmp_path / "lock", DEAD_AFTER + 1)
    take(tmp_path, print)


def test_a_process_may_take_its_own_lock_again_and_the_first_holder_releases_nothing(tmp_path: Path):
    said: list[str] = []
    first, second = take(tmp_path, said.append), take(tmp_path, said.append)
    first.release()
    assert token_in(tmp_path) == second.token
    assert said == []


def test_a_lock_that_another_start_has_just_created_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both saw the stale lock; the other was faster, and the file system has no flock."""
    hold(tmp_path, pid=2**22 + 1)
    original = locks._lives

    def lives(holder: dict[str, Any]) -> bool:
        (tmp_path / "lock").write_text(json.dumps({"pid": 1, "host": "node7", "token": "faster"}))
        return original(holder)

    monkeypatch.setattr(locks, "_lives", lives)
    with pytest.raises(ValueError, match="is in use by process 1 on node7"):
        take(tmp_path, print)
    assert token_in(tmp_path) == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_heartbeat_touches_the_lock_while_it_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    gc.collect()
    monkeypatch.setattr(locks, "HEARTBEAT", 0.01)
    lock = take(tmp_path, print)
    age(tmp_path / "lock", 500)
    deadline = time.monotonic() + 10
    while time.time() - (tmp_path / "lock").stat().st_mtime > 100:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()
    while any(thread.name == "run_dir/lock" for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "it ends with the lock"
        time.sleep(0.01)


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"run_dir={tmp_path}/file/run cannot be written .Not a directory.; give"):
        take(tmp_path / "file" / "run", print)


def _start(run_dir: Path, go: Any, all_started: Any, results: Any) -> None:
    go.wait()
    try:
        lock = take(run_dir, lambda line: None)
    except ValueError:
        results.put(0)
    else:
        results.put(1)
        all_started.wait()  # a start that comes later would find the lock free again
        lock.release()


@pytest.mark.slow
@pytest.mark.parametrize("is_stale", [False, True])
def test_of_many_starts_at_once_one_goes_on(tmp_path: Path, is_stale: bool):
    context = multiprocessing.get_context("forkserver")  # to fork the suite's own process takes more than it may have
    context.set_forkserver_preload(["rlcm_fast.run_folder.lock"])
    for attempt in range(10):
        run_dir = tmp_path / str(attempt)
        if is_stale:
            hold(run_dir, pid=2**22 + 1)
        go, all_started, results = context.Event(), context.Event(), context.Queue()
        processes = [context.Process(target=_start, args=(run_dir, go, all_started, results)) for _ in range(8)]
        for process in processes:
            process.start()
        go.set()
        num_taken = sum(results.get(timeout=30) for _ in processes)
        all_started.set()
        assert num_taken == 1
        for process in processes:
            process.join()
