"""The one door: whatever is raised becomes one line and an exit code, with the traceback of its root for --debug."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlcm_fast.cli import main as cli
from rlcm_fast.config import parse_config
from rlcm_fast.door import Door, take_debug
from rlcm_fast.faults import Fault, SharedMistake, in_one_line


def raising(error: BaseException, cause: BaseException | None = None) -> Callable[[], int]:
    def work() -> int:
        raise error from cause

    return work


def said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    return err


FOREIGN = {
    "a library's": (lambda: json.loads("{"), 2, "error: JSONDecodeError: Expecting property name enclosed in double"),
    "int of a text": (lambda: int("x"), 2, "error: ValueError: invalid literal for int() with base 10: 'x' (at "),
    "several lines": (raising(RuntimeError("a\n\n  b\x1b[2J")), 2, "error: RuntimeError: a b\\x1b[2J (at "),
    "no words": (raising(AssertionError()), 2, "error: AssertionError (at "),
    "a missing file": (Path("no/such").read_text, 2, "error: no/such is not there; give a path that exists\n"),
    "a long name": (Path("x" * 300).read_text, 2, f"error: {'x' * 300} is too long for a path (255 bytes a name"),
    "a full disk": (raising(OSError(errno.ENOSPC, "full")), 1, "error: the disk is full; free some space"),
    "no memory": (raising(MemoryError()), 1, "error: out of memory (MemoryError); ask for less at once"),
    "a fault": (raising(Fault("the reward is gone; repair it")), 1, "error: the reward is gone; repair it\n"),
    "a chain": (raising(TypeError("outer"), KeyError("inner")), 2, "error: TypeError: outer (at "),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_whatever_is_raised_ends_in_one_line_with_its_place(kind: str, capsys: pytest.CaptureFixture[str]):
    work, code, line = FOREIGN[kind]
    assert Door().lead(work) == code  # pyright: ignore[reportArgumentType]
    err = said(capsys)
    assert err.startswith(line)
    assert err.count("\n") == 1
    if "(at " in line:
        assert "test_door.py" in err or "json/decoder.py" in err
        assert err.endswith("nobody foresaw this: please report it, as docs/reliability.md says\n")
    assert Door(has_begun=True).lead(work) == 1  # pyright: ignore[reportArgumentType]
    said(capsys)


def test_a_line_of_ours_passes_through_unchanged(capsys: pytest.CaptureFixture[str]):
    assert Door().lead(lambda: bool(parse_config(["--sed", "1"]))) == 2
    assert said(capsys) == "error: --sed is no field of the config; did you mean --seed? --help lists every field\n"


def test_debug_shows_one_traceback_and_that_of_the_root(capsys: pytest.CaptureFixture[str]):
    def work() -> int:
        try:
            return {}["inner"]
        except KeyError as error:
            raise TypeError("outer") from error

    assert Door(debug=True).lead(work) == 2
    err = said(capsys)
    assert err.count("Traceback") == 1
    assert 'return {}["inner"]' in err and "KeyError: 'inner'" in err and "The above exception" not in err
    assert err.splitlines()[-1].startswith("error: TypeError: outer (at ")


def test_a_mistake_of_all_processes_is_printed_once(capsys: pytest.CaptureFixture[str]):
    assert Door(rank=1).lead(raising(SharedMistake("wrong"))) == 2
    assert Door(rank=1).lead(raising(Fault("lost").of_all())) == 1
    assert said(capsys) == ""
    assert Door(rank=1).lead(raising(Fault("lost"))) == 1
    assert said(capsys) == "error: lost (rank 1)\n"


def test_an_interruption_and_a_closed_pipe_are_no_errors(capsys: pytest.CaptureFixture[str]):
    assert Door().lead(raising(KeyboardInterrupt())) == 130
    assert said(capsys) == "interrupted\n"
    assert os.path.exists(os.devnull)


def test_a_line_is_bounded_and_keeps_its_way_out():
    line = in_one_line("a" * 100_000 + "; give b")
    assert len(line) < 2100 and line.endswith("; give b")


@pytest.mark.parametrize(
    ("argv", "debug", "rest"),
    [
        (["plan"], False, ["plan"]),
        (["plan", "--debug"], True, ["plan"]),
        (["plan", "--debug", "true", "--seed", "1"], True, ["plan", "--seed", "1"]),
        (["--debug=false", "plan"], False, ["plan"]),
        (
            ["sample", "--prompt", "true", "--debug", "--out", "x=y"],
            True,
            ["sample", "--prompt", "true", "--out", "x=y"],
        ),
    ],
)
def test_debug_is_found_anywhere_on_the_command_line(argv: list[str], debug: bool, rest: list[str]):
    assert take_debug(argv) == (debug, rest)


def test_the_tools_pass_through_the_same_door(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.config.files.shipped_configs", raising(KeyError("x")))
    monkeypatch.setenv("RLCM_FAST_DEBUG", "0")
    assert cli.main(["configs"]) == 2
    assert said(capsys).startswith("error: KeyError: 'x' (at rlcm_fast/cli/configs.py:")
    assert cli.main(["configs", "--debug"]) == 2
    err = said(capsys)
    assert err.count("Traceback") == 1 and err.splitlines()[-1].startswith("error: KeyError: 'x'")
