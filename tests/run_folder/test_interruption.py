"""Which signals ask for a stop, and which end the process at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from rlcm_fast.run_folder import interruption
from rlcm_fast.run_folder.interruption import Interrupted, Interruption


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_what_a_launcher_sends_after_a_ctrl_c_is_the_same_wish(tmp_path: Path):
    with Interruption(tmp_path / "stop") as stop:
        stop.check()
        assert not stop.agreed()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
            send(number)
        assert stop.agreed()
        with pytest.raises(Interrupted):
            stop.check()


def test_a_second_ctrl_c_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interruption, "_SAME_CTRL_C", 0.0)
    with Interruption(tmp_path / "stop"):
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_handlers_are_the_old_ones_afterwards(tmp_path: Path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption(tmp_path / "stop"):
        send(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_file_asks_for_a_stop_between_iterations_and_one_of_an_earlier_run_does_not(tmp_path: Path):
    (tmp_path / "stop").touch()
    with Interruption(tmp_path / "stop") as stop:
        assert not stop.agreed()
        (tmp_path / "stop").touch()
        assert stop.agreed()
        stop.check()
