"""Checks a command's output file and device before the command works for them, and loses no result to a bad path."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rlcm_fast.config.files import check_name
from rlcm_fast.faults import Fault

PICTURES = (".png", ".jpg", ".jpeg")


def check_out(out: str, suffixes: Sequence[str] = ()) -> Path:
    """Returns the path of the output file, whose folder exists afterwards.

    suffixes: what the name may end in; empty allows everything.

    Raises:
        ValueError: the name has another ending, or the file cannot be written there.
    """
    check_name("out", out)
    path = Path(out)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(f"out={out} has no known ending; give a name that ends in {', '.join(suffixes)}")
    try:
        is_folder, is_there = path.is_dir(), path.exists()
        with contextlib.suppress(FileNotFoundError):
            os.stat(path)  # raises for a link to itself
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"out={out} cannot be written ({error.strerror}); give a file in a folder of yours") from error
    if is_folder:
        raise ValueError(f"out={out} is a folder; give the name of a file in it")
    if is_there and not path.is_file():
        raise ValueError(f"out={out} is no plain file; give another name")
    if is_there and not os.access(path, os.W_OK):
        raise ValueError(f"out={out} is write-protected; give another name, or remove it")
    return path


def check_out_folder(out: str) -> Path:
    """Returns the path of the output folder, which exists afterwards.

    Raises:
        ValueError: it is a file, or nothing can be written there.
    """
    path = Path(out)
    if os.path.isfile(path):
        raise ValueError(f"out={out} is a file; give a folder, which may be new")
    check_out(str(path / "scores.json"))
    return path


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Calls `save(path)`; if that fails, saves beside other temporary files.

    Raises:
        Fault: the file could not be written at `path`; the message says where it is.
    """
    try:
        save(path)
    except OSError as error:
        other = Path(tempfile.mkdtemp(prefix="rlcm_fast_")) / path.name
        save(other)
        raise Fault(f"out={path} could not be written ({error.strerror or error}); the result is in {other}") from error


def check_device(device: str | None) -> None:
    """Raises ValueError unless torch knows the device and this machine has it; None leaves the choice to us."""
    if device is None:
        return
    import torch

    try:
        torch.zeros(1, device=device).item()  # meta has no numbers
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        has_gpu = torch.cuda.is_available()
        known = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count() if has_gpu else 0))])
        raise ValueError(f"device={device} cannot be used ({reason}); this machine has {known}") from error
