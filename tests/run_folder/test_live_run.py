"""A whole run in a pseudo-terminal: its view, a terminal that is resized, Ctrl-C, and what a pipe gets instead."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
import tiny_runs

pytestmark = pytest.mark.slow


class Terminal:
    """Runs a command in a terminal and shows what stands on its screen."""

    def __init__(self, command: list[str], columns: int = 100, rows: int = 30) -> None:
        self.screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._master, slave = pty.openpty()
        self.resize(columns, rows)
        environment = tiny_runs.clean_environment(TERM="xterm-256color", PYTHONUNBUFFERED="1")
        environment = {name: value for name, value in environment.items() if name not in ("CI", "NO_COLOR")}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, preexec_fn=_take_terminal
        )
        os.close(slave)
        self._lock = threading.Lock()
        threading.Thread(target=self._read, daemon=True).start()

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self._master, keys)

    @property
    def lines(self) -> list[str]:
        with self._lock:
            return [line.rstrip() for line in self.screen.display if line.strip()]

    def wait_for(self, is_there: Callable[[list[str]], bool]) -> list[str]:
        deadline = time.monotonic() + 60
        while not is_there(self.lines):
            assert time.monotonic() < deadline, "\n".join(self.lines)
            time.sleep(0.05)
        return self.lines

    def _read(self) -> None:
        stream = pyte.ByteStream(self.screen)
        with contextlib.suppress(OSError):  # the command has ended
            while content := os.read(self._master, 4096):
                with self._lock:
                    stream.feed(content)


def _take_terminal() -> None:
    """Makes the terminal that of the new process, so that Ctrl-C reaches it."""
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def finished(lines: list[str]) -> int:
    """Returns the number of finished iterations that the last view shows; -1 without one."""
    shown = [line.split()[1].partition("/")[0] for line in lines if line.startswith("train ") and "/" in line]
    return int(shown[-1]) if shown and shown[-1].isdigit() else -1


def command_of(model: str, run_dir: Path, **settings: object) -> list[str]:
    return [sys.executable, "-m", "rlcm_fast.train", *tiny_runs.arguments(model, run_dir, settings)]


def test_a_run_in_a_terminal_shows_itself_and_stops_with_a_checkpoint(tiny_lcm_folder: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    settings = {"num_iterations": 100_000, "evaluation.every": 3, "tracking.report": True}
    terminal = Terminal(command_of(tiny_lcm_folder, run_dir, **settings))
    lines = terminal.wait_for(lambda lines: finished(lines) >= 4)
    assert any("first iteration: number 1 of 100000" in line for line in lines)
    assert any(line.startswith(tiny_runs.REWARD) for line in lines) and any(
        line.startswith("held out") for line in lines
    )

    # In a narrow terminal it shows less, and whole lines.
    terminal.resize(50, 16)
    os.kill(terminal.process.pid, signal.SIGWINCH)
    terminal.wait_for(lambda lines: finished(lines) >= 7)

    # Ctrl-C says what happens, then does it.
    terminal.press(b"\x03")
    terminal.process.wait(timeout=60)
    lines = terminal.wait_for(lambda lines: "go on with --resume latest" in "".join(lines))
    assert "SIGINT: stopping after this evaluation or micro" in "".join(lines)
    assert terminal.process.returncode == 0 and not terminal.screen.cursor.hidden
    assert list((run_dir / "checkpoints").glob("iteration_*"))
    assert "The run stopped early" in (run_dir / "report.html").read_text()


def test_a_pipe_gets_plain_lines(tiny_lcm_folder: str, tmp_path: Path):
    done = subprocess.run(
        command_of(tiny_lcm_folder, tmp_path / "run"),
        env=tiny_runs.clean_environment(),
        capture_output=True,
        check=True,
    )
    said = done.stderr.decode()
    assert "\x1b" not in said and "\r" not in said
    assert "\niteration 1 of 3: total " in said and "\niteration 3 of 3: total " in said
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]
