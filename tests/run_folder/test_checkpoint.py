"""Checkpoints are complete or absent; the engine here writes one file. tests/test_resume.py has the real one."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

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


def test_unfinished_folders_are_no_checkpoints(tmp_path: Path):
    folder = save(tmp_path, 1)
    shutil.copytree(folder, folder.with_name(".partial_iteration_000002"))
    assert latest(tmp_path) == (1, 1.0)
