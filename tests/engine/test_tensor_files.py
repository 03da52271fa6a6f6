"""Files of tensors: what safetensors reads back, one tensor at a time, and whole to the last byte."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rlcm_fast.engine import tensor_files
from rlcm_fast.engine.tensor_files import (
    checksum_in,
    fault_of_tensors,
    read_metadata,
    read_tensors,
    sync_folder,
    write_tensors,
)
from rlcm_fast.run_folder.checkpoint import is_full_disk

TENSORS = {
    "odd": torch.arange(5, dtype=torch.uint8),
    "rounded": torch.randn(3, 7).bfloat16(),
    "half": torch.randn(3).half(),
    "transposed": torch.randn(4, 6).T,
    "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "counts": torch.arange(3),
    "small": torch.arange(3, dtype=torch.int32),
    "mask": torch.tensor([True, False, True]),
    "a stretch": torch.randn(100)[7:30],
}


def test_safetensors_reads_what_was_written(tmp_path: Path):
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, TENSORS, {"num_updates": "3", "text": '"crc32": "'})
    for read in (load_file(path), read_tensors(path)):
        assert read.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["num_updates"] == "3"
    assert read_metadata(path)["text"] == '"crc32": "'
    assert fault_of_tensors(path, checksum_in(path)) is None


def test_a_file_without_tensors_is_whole(tmp_path: Path):
    write_tensors(tmp_path / "none.safetensors", {})
    assert read_tensors(tmp_path / "none.safetensors") == {}
    assert fault_of_tensors(tmp_path / "none.safetensors", checksum_in(tmp_path / "none.safetensors")) is None


def test_every_changed_byte_and_every_missing_end_is_noticed(tmp_path: Path):
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, {"a": torch.arange(20.0), "b": torch.arange(3, dtype=torch.uint8)})
    whole, checksum = path.read_bytes(), checksum_in(path)
    assert checksum
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert fault_of_tensors(path, checksum), place
        path.write_bytes(whole[:place])
        assert fault_of_tensors(path, checksum), place
    path.write_bytes(whole)
    assert fault_of_tensors(path, checksum) is None


def test_a_file_of_another_program_is_compared_with_its_header(tmp_path: Path):
    path = tmp_path / "tensors.safetensors"
    save_file({"a": torch.arange(20.0)}, path)
    assert checksum_in(path) is None
    assert fault_of_tensors(path, None) is None
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated" in str(fault_of_tensors(path, None))
    path.unlink()
    assert "is missing" in str(fault_of_tensors(path, None))


def test_a_full_disk_is_known_as_one():
    with pytest.raises(OSError) as caught:
        write_tensors(Path("/dev/full"), {"a": torch.zeros(100_000)})
    assert is_full_disk(caught.value)


def test_tensors_are_brought_to_the_cpu_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events: list[str] = []
    bytes_of = tensor_files._bytes_of
    monkeypatch.setattr(tensor_files, "_bytes_of", lambda tensor: events.append("copied") or bytes_of(tensor))
    monkeypatch.setattr(tensor_files.zlib, "crc32", lambda *values: events.append("written") or 0)
    write_tensors(tmp_path / "tensors.safetensors", {"a": torch.zeros(3), "b": torch.zeros(3)})
    assert events == ["written", "copied", "written", "copied", "written"]  # the first is the header


def test_a_folder_that_cannot_be_synced_is_none_on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(number: int, code: int) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", lambda number: refuse(number, errno.EINVAL))
    sync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda number: refuse(number, errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        sync_folder(tmp_path)
