"""Checkpoints are complete or absent; the engine here writes one file. tests/test_resume.py has the real one."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.run_folder import checkpoint
from rlcm_fast.run_folder.checkpoint import (
    is_full_disk,
    load_checkpoint,
    save_checkpoint,
)


class FakeEngine:
    def __init__(self, value: float = 0.0, disk_is_full: bool = False) -> None:
        self.value = value
        self.disk_is_full = disk_is_full

    def save(self, folder: Path) -> None:
        (folder / "deepspeed").mkdir()
        (folder / "deepspeed" / "value").write_text(str(self.value))
        if self.disk_is_full:
            raise OSError(28, "No space left on device")

    def load(self, folder: Path, trusts_old: bool = False) -> None:
        self.value = float((folder / "deepspeed" / "value").read_text())

    def full_weights(self) -> dict[str, Tensor]:
        return {"weight": torch.tensor([self.value])}


def save(run_dir: Path, iteration: int, keep: int = 2, **engine: Any) -> Path:
    fake: Any = FakeEngine(value=float(iteration), **engine)
    return save_checkpoint(run_dir, iteration, fake, {"iteration": iteration}, keep)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def latest(run_dir: Path) -> tuple[int, float]:
    """The iteration and the weight that a resumed run finds."""
    folder = checkpoint.newest_whole(run_dir, print)
    assert folder is not None
    engine: Any = FakeEngine()
    return load_checkpoint(folder, engine)["iteration"], engine.value


def test_the_latest_checkpoint_brings_back_state_and_weights(tmp_path: Path):
    folder = save(tmp_path, 9)
    save(tmp_path, 10)
    assert latest(tmp_path) == (10, 10.0)
    assert load_file(folder / "unet.safetensors")["weight"].item() == 9.0


def test_the_last_k_are_kept(tmp_path: Path):
    for iteration in (5, 50, 500, 1000):
        save(tmp_path, iteration, keep=3)
    assert names(tmp_path) == ["iteration_000050", "iteration_000500", "iteration_001000"]


def test_a_full_disk_leaves_the_earlier_checkpoints_and_the_next_try_works(tmp_path: Path):
    save(tmp_path, 1)
    with pytest.raises(OSError, match="No space left on device"):
        save(tmp_path, 2, disk_is_full=True)
    assert latest(tmp_path) == (1, 1.0)
    assert names(tmp_path) == ["iteration_000001"], "nothing half-written is left"
    save(tmp_path, 2)
    assert latest(tmp_path) == (2, 2.0)


def test_a_full_disk_is_known_by_what_the_libraries_say():
    def write() -> None:
        with open("/dev/full", "w") as file:
            file.write("text")

    for fails in (write, lambda: torch.save(torch.zeros(100_000), "/dev/full")):
        with pytest.raises((OSError, RuntimeError)) as caught:
            fails()
        assert is_full_disk(caught.value)
    assert is_full_disk(SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert not is_full_disk(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_killed_while_it_deletes_still_has_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: int
):
    save(tmp_path, 1, keep)

    def killed(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "state.json").unlink(missing_ok=True)  # the first of the files
            raise KeyboardInterrupt

    for iteration in (2, 2):  # the second time it replaces a checkpoint of the same iteration
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint.shutil, "rmtree", killed)
            with contextlib.suppress(KeyboardInterrupt):
                save(tmp_path, iteration, keep)
        assert latest(tmp_path) == (2, 2.0)
    save(tmp_path, 3, keep)
    assert names(tmp_path) == ["iteration_000002", "iteration_000003"][-keep:]


def test_a_run_killed_while_it_replaces_a_checkpoint_still_has_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path, 1, keep=1)
    replace = checkpoint.os.replace

    def killed(source: Path, target: Path) -> None:
        if source.name.startswith(".partial_"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", killed)
        with contextlib.suppress(KeyboardInterrupt):
            save(tmp_path, 1, keep=1)
    assert names(tmp_path) == [".replaced_iteration_000001"]
    checkpoint.restore(tmp_path)
    assert latest(tmp_path) == (1, 1.0)
    save(tmp_path, 1, keep=1)
    assert names(tmp_path) == ["iteration_000001"]


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name(".partial_iteration_000002"))
    assert latest(tmp_path) == (1, 1.0)


def test_a_checkpoint_that_cannot_be_deleted_is_a_line_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    replace, remove = checkpoint.os.replace, checkpoint.shutil.rmtree

    def no_replace(source: Path, target: Path) -> None:
        if target.name == ".trash_iteration_000001":
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    def no_remove(folder: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors and folder.exists():
            raise OSError(16, "Device or resource busy")
        remove(folder, ignore_errors)

    save(tmp_path, 1, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", no_replace)
        save(tmp_path, 2, keep=1)
    first = tmp_path / "checkpoints" / "iteration_000001"
    assert f"checkpoint {first} could not be deleted ([Errno 13] Permission denied); the run" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", no_remove)
        save(tmp_path, 3, keep=1)
    assert ".trash_iteration_000001 could not be deleted ([Errno 16]" in capsys.readouterr().err
    assert latest(tmp_path) == (3, 3.0)
    save(tmp_path, 4, keep=1)
    assert names(tmp_path) == ["iteration_000004"], "what was left is deleted next time"


def test_files_and_folders_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    events: list[str] = []
    replace, sync = checkpoint.os.replace, os.fsync

    def noted_sync(number: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{number}")).name)
        sync(number)

    def noted_replace(source: Path, target: Path) -> None:
        events.append(f"rename {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(checkpoint.os, "replace", noted_replace)
    save(tmp_path, 1)
    rename = events.index("rename iteration_000001")
    before = ["unet.safetensors", "state.json", "index.json", ".partial_iteration_000001"]
    assert events[:rename] == before and events[rename + 1 :] == ["checkpoints"]


def test_all_ranks_raise_what_one_could_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else they would wait for it in vain."""
    other = "[Errno 28] No space left on device: 'engine/weights_00001_of_00002.safetensors'"
    monkeypatch.setattr(parallel, "all_gather_list", lambda mine: [*mine, other])
    with pytest.raises(OSError, match="No space left on device: 'engine/weights_00001") as caught:
        save(tmp_path, 1)
    assert is_full_disk(caught.value)
    assert names(tmp_path) == []
