"""Lines on stderr: above the bar, and lost without harm if nobody can read them."""

from __future__ import annotations

import io
import sys

import pytest
from tqdm import tqdm

from rlcm_fast.terminal import TERMINAL, write_line


class Gone(io.StringIO):
    """A terminal whose connection is lost."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None:
        raise BrokenPipeError(32, "Broken pipe")


def test_without_a_reader_a_line_and_a_bar_are_lost_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    write_line("nobody hears this")
    bar = tqdm(total=2, file=TERMINAL)
    bar.update()
    bar.close()


def test_a_line_is_written_above_the_bar(capsys: pytest.CaptureFixture[str]):
    bar = tqdm(total=2, file=TERMINAL, mininterval=0)
    write_line("a line")
    bar.close()
    said = capsys.readouterr().err
    before = said.partition("a line")[0]
    assert before.endswith("\r"), "the bar was not cleared before the line"
