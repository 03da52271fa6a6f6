"""One run writes into a run folder: its main process holds run_dir/lock while it lives.

    {"pid": 4711, "process_start": 1760000000.25, "host": "node1", "boot": "...", "pid_namespace": 4026531836,
     "since": "2025-10-09T08:53:20+00:00", "token": "..."}

Taken        created with O_EXCL, which is atomic on local file systems and on NFS from version 3 on.
Kept         a thread touches it every 15 seconds, so that other machines see that its process lives.
Released     at the end of the run, when it is no longer used, or when Python exits; a kill -9 leaves it behind.
Stale        on the same machine (host, boot and process namespace), if no process has its id and start time.
             From any other machine, and for a file that cannot be read, if nobody has touched it for 120 seconds; both
             ages are times of the file system's own clock.

What is promised: of two starts at the same moment, one goes on. A stale lock is replaced under flock where the file
system has it; elsewhere it is renamed and then compared, so two starts that replace one stale lock within the same few
microseconds may both refuse, but not both go on. A process that was suspended for more than 120 seconds may find, when
it goes on, that a process of another machine has taken its place.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from rlcm_fast.finite_json import is_number, load_json

HEARTBEAT, DEAD_AFTER = 15.0, 120.0  # seconds

_NAME = "lock"
_SAME_START = 2.0  # seconds: the clock that start times are computed from may be set in between


class Lock:
    """A held lock; it is released by `release`, when nothing refers to it any more, or when Python exits."""

    def __init__(self, path: Path, token: str, is_new: bool = False) -> None:
        """is_new: the run folder was made for the lock, so it goes with it if nothing else has come into it."""
        self.token = token
        self._ended = threading.Event()
        threading.Thread(target=_keep, args=(path, token, self._ended), daemon=True, name="run_dir/lock").start()
        self._release = weakref.finalize(self, _remove, path, token, self._ended, is_new)

    def release(self) -> None:
        """Removes the lock, if it is still ours; does nothing the second time."""
        self._release()


def take(run_dir: Path, say: Callable[[str], None]) -> Lock:
    """Takes the lock of a run folder, which it creates if necessary; call it on the main process.

    A process may take its own lock again: the earlier holder then releases nothing.

    Raises:
        ValueError: another process holds it, or the folder cannot be written.
    """
    try:
        is_new = not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        with _one_at_a_time(run_dir):
            _clear(run_dir, say)
            return Lock(*_create(run_dir), is_new)
    except OSError as error:
        raise ValueError(f"run_dir={run_dir} cannot be written ({error.strerror}); give another") from error


def token_in(run_dir: Path) -> str | None:
    """Returns the random text in a run folder's lock; None if there is no lock."""
    return _read(run_dir / _NAME).get("token")


def _create(run_dir: Path) -> tuple[Path, str]:
    """Writes the lock's file and returns its path and token; raises ValueError if another process was faster."""
    path, token = run_dir / _NAME, secrets.token_hex(16)
    holder = {**_machine(), **_process(), "since": datetime.now(UTC).isoformat(timespec="seconds"), "token": token}
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        raise ValueError(_in_use(run_dir, _read(path), 0.0)) from None
    with os.fdopen(descriptor, "w") as file:
        json.dump(holder, file, indent=2, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    return path, token


def _clear(run_dir: Path, say: Callable[[str], None]) -> None:
    """Removes a stale lock; raises ValueError if its holder lives."""
    # Ask whether the holder lives: by its process on this machine, else by when it last touched the file.
    path = run_dir / _NAME
    holder, silence = _read(path), _silence(path)
    if silence is None:
        return
    is_here = _has_process(holder) and all(holder.get(key) == value for key, value in _machine().items())
    is_own = is_here and _is_same_process(holder, os.getpid())
    lives = _lives(holder) if is_here else silence < DEAD_AFTER
    if lives and not is_own:
        raise ValueError(_in_use(run_dir, holder, silence))

    # Set it aside and look again, so that a lock that another start has just created is given back.
    aside = path.with_name(f".{_NAME}_{secrets.token_hex(8)}")
    os.rename(path, aside)
    seized = _read(aside)
    if seized != holder:
        if not path.exists():
            os.rename(aside, path)
        raise ValueError(_in_use(run_dir, seized, 0.0))
    aside.unlink()
    if not is_own:
        say(f"run_dir={run_dir} had the lock of {_named(holder)}, which is gone: the lock is taken over")


def _in_use(run_dir: Path, holder: dict[str, Any], silence: float) -> str:
    since = f" since {holder['since']}" if "since" in holder else ""
    gone = (
        f"if it is gone, this works {DEAD_AFTER:.0f} s after its last sign of life ({silence:.0f} s ago), or after: "
        f"rm {run_dir}/{_NAME}"
    )
    return (
        f"run_dir={run_dir} is in use{since} by {_named(holder)}; wait for its end, or give another --run_dir; {gone}"
    )


def _named(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= holder.keys() else "an unknown process"


def _read(path: Path) -> dict[str, Any]:
    """Returns what the lock says; {} if there is none, or if it is not written yet or damaged."""
    try:
        content = load_json(path.read_bytes()) if path.is_file() else {}  # reading a pipe would never end
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _has_process(holder: dict[str, Any]) -> bool:
    """Tells whether a lock names a process that a machine may have."""
    pid, start = holder.get("pid"), holder.get("process_start")
    return isinstance(pid, int) and 0 < pid < 2**31 and is_number(start)


def _silence(path: Path) -> float | None:
    """Returns the seconds since the lock was touched, by the clock of its file system; None if there is no lock."""
    probe = path.with_name(f".{_NAME}_{secrets.token_hex(8)}")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return None
    finally:
        probe.unlink()


def _machine() -> dict[str, Any]:
    """Returns what tells within which machine, and since which start of it, a process id has a meaning."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if boot.exists() else None,
        "pid_namespace": namespace.stat().st_ino if namespace.exists() else None,
    }


def _process() -> dict[str, Any]:
    return {"pid": os.getpid(), "process_start": psutil.Process().create_time()}


def _lives(holder: dict[str, Any]) -> bool:
    """Tells whether the holder's process lives on this machine; another process may have its id by now."""
    try:
        process = psutil.Process(holder["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and _is_same_process(holder, process.pid)
    except psutil.NoSuchProcess:
        return False


def _is_same_process(holder: dict[str, Any], pid: int) -> bool:
    started = psutil.Process(pid).create_time()
    return holder["pid"] == pid and abs(holder["process_start"] - started) <= _SAME_START


@contextlib.contextmanager
def _one_at_a_time(run_dir: Path) -> Iterator[None]:
    """Lets one process after the other into the block, where the file system can do that."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # NFS cannot lock a folder
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _keep(path: Path, token: str, ended: threading.Event) -> None:
    """Touches the lock until it ends, or until it is not ours any more."""
    while not ended.wait(HEARTBEAT):
        if _read(path).get("token") != token:
            return
        with contextlib.suppress(OSError):  # a file system that comes back later
            os.utime(path)


def _remove(path: Path, token: str, ended: threading.Event, is_new: bool) -> None:
    """Removes the lock, if it is still ours, and a new run folder that is empty without it."""
    ended.set()
    holder = _read(path)
    if holder.get("token") != token or holder.get("pid") != os.getpid():
        return
    with contextlib.suppress(OSError):
        path.unlink()
        if is_new:
            path.parent.rmdir()  # fails unless it is empty: a start that was refused leaves nothing behind
