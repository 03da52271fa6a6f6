"""Which signals ask for a stop, and which end the process at once."""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny_runs

from benchmarks.shared import run_processes
from rlcm_fast import parallel
from rlcm_fast.config import parse_config
from rlcm_fast.run_folder import interruption
from rlcm_fast.run_folder.interruption import Interrupted, Interruption
from rlcm_fast.trainer import Trainer


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


def test_the_first_signal_is_answered_by_what_happens_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with Interruption(tmp_path / "stop") as stop:
        send(signal.SIGINT)
        send(signal.SIGTERM)  # of the launcher
        assert stop.agreed()
    assert capsys.readouterr().err == (
        "SIGINT: stopping after this evaluation or micro-batch, or after this iteration if its weights have moved; "
        "a checkpoint is saved; a second Ctrl-C ends the process at once, without a checkpoint\n"
    )


def test_the_answer_fits_several_processes_and_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    answer = Interruption(tmp_path / "stop", may_exit=False).answer(signal.SIGTERM)
    assert answer.startswith("SIGTERM: stopping after this iteration; a checkpoint is saved; ")
    assert answer.endswith("a second Ctrl-C raises KeyboardInterrupt")


def test_after_the_last_iteration_the_answer_stops_nothing(tmp_path: Path):
    stop = Interruption(tmp_path / "stop")
    stop.is_training = False
    assert stop.answer(signal.SIGINT) == (
        "SIGINT: the trained weights are saved; the run ends after its last evaluation and its export; a second Ctrl-C "
        "ends the process at once"
    )


@pytest.mark.usefixtures("one_process")
def test_ctrl_c_in_the_last_evaluation_lets_the_run_end(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    settings = {"num_iterations": 1, "evaluation.every": 1}
    trainer = Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)))
    evaluate = trainer.evaluate

    def interrupted(iteration: int) -> dict[str, float]:
        if iteration == 1:
            send(signal.SIGINT)
        return evaluate(iteration)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    assert trainer.run()
    assert "SIGINT: the trained weights are saved; the run ends after its last" in capsys.readouterr().err
    assert list((tmp_path / "run" / "checkpoints").glob("iteration_*"))
    assert (tmp_path / "run" / "export" / "model_index.json").is_file()


def _wait_blocked(folder: str) -> int:
    """Waits in a library call that no signal ends, as a run does whose reward never returns."""
    with Interruption(Path(folder) / "stop"):
        (Path(folder) / "waits").touch()
        queue.Queue().get()
    return 0


def test_a_second_ctrl_c_ends_a_blocked_process_at_once_and_a_second_sigterm_does_not(tmp_path: Path):
    process = run_processes.start(_wait_blocked, str(tmp_path), log=tmp_path / "log")
    assert process.pid is not None
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(interruption._SAME_CTRL_C + 0.2)
    os.kill(process.pid, signal.SIGTERM)
    process.join(timeout=0.5)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGINT)
    process.join(timeout=5)
    assert process.exitcode == 130
    assert "interrupted" in (tmp_path / "log").read_text()


def test_a_second_ctrl_c_in_a_program_raises_and_leaves_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(interruption, "_SAME_CTRL_C", 0.05)
    with Interruption(tmp_path / "stop", may_exit=False) as stop:
        send(signal.SIGINT)
        time.sleep(0.1)
        with pytest.raises(Interrupted):
            stop.check()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            send(signal.SIGINT)
            time.sleep(5)


def test_a_run_outside_of_the_main_thread_takes_no_signals_and_hears_of_the_file(tmp_path: Path):
    heard = []

    def run() -> None:
        with Interruption(tmp_path / "stop") as stop:
            (tmp_path / "stop").touch()
            heard.append(stop.agreed())

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert heard == [True]
    assert signal.getsignal(signal.SIGINT) == before


def test_a_lost_terminal_asks_for_a_stop_unless_hangups_are_ignored(tmp_path: Path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with Interruption(tmp_path / "stop") as stop:
            send(signal.SIGHUP)
            assert stop.agreed()
        assert signal.signal(signal.SIGHUP, signal.SIG_IGN) == signal.SIG_DFL  # as nohup does
        with Interruption(tmp_path / "stop") as stop:
            send(signal.SIGHUP)
            assert not stop.agreed()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_death_of_a_launcher_asks_for_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    launcher = subprocess.Popen(["sleep", "100"])
    monkeypatch.setattr(interruption, "_WATCH_SECONDS", 0.05)
    monkeypatch.setattr(interruption, "launchers_of_this_process", lambda: [psutil.Process(launcher.pid)])
    with Interruption(tmp_path / "stop") as stop:
        time.sleep(0.2)
        assert not stop.agreed()
        launcher.kill()  # and nobody waits for it, so it stays a zombie
        deadline = time.monotonic() + 5
        while not stop.agreed() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert stop.agreed()
    launcher.wait()


def test_launchers_are_known_by_their_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Process:
        def __init__(self, *command: str) -> None:
            self._command = list(command)

        def cmdline(self) -> list[str]:
            return self._command

        def parents(self) -> list[Process]:
            return parents

    runner = Process("/usr/bin/python3", "/usr/bin/deepspeed", "rlcm_fast/train.py")
    launch = Process("/usr/bin/python3", "-u", "-m", "deepspeed.launcher.launch", "--world_info=x")
    shell = Process("bash", "/home/me/deepspeed-runs/go.sh")
    parents = [launch, runner, shell]
    monkeypatch.setattr(interruption.psutil, "Process", lambda: Process())
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert interruption.launchers_of_this_process() == [launch, runner]
    parents = [shell, runner]
    assert interruption.launchers_of_this_process() == []
    parents = [launch]
    monkeypatch.delenv("LOCAL_RANK")
    assert interruption.launchers_of_this_process() == []


def test_handlers_are_the_old_ones_afterwards(tmp_path: Path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Interruption(tmp_path / "stop"):
        send(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_file_asks_for_a_stop_between_iterations_and_one_of_an_earlier_run_does_not(tmp_path: Path):
    (tmp_path / "stop").touch()
    with Interruption(tmp_path / "stop") as stop:
        assert not stop.agreed()
        (tmp_path / "stop").touch()
        assert stop.agreed()
        stop.check()
