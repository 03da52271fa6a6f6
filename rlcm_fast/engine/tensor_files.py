"""Files of tensors and of JSON that are on the disk when the call returns, and that show whether they are whole.

Tensors are in the safetensors format, which holds no code. Its library reads them. `write_tensors` writes them itself,
because save_file first copies all tensors of a GPU to CPU memory; here one is copied at a time, so the moments of
SD1.5's UNet (6.9 GB) need 118 MB there, the size of its largest weight. A file's metadata holds the CRC-32 of all its
bytes, taken while they are written (2.2 GB/s on a core of a Xeon), with eight zeros in the CRC's own place.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_CHECKSUM = "crc32"
_BLANK = b"0" * 8
_CHUNK = 1 << 24  # bytes that are read at once


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors of any device and memory layout; each is copied to the CPU alone.

    Raises:
        OSError: the disk is full or not writable.
    """
    # Large elements first, so that each tensor begins at a multiple of its elements' size.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {**(metadata or {}), _CHECKSUM: _BLANK.decode()}}
    end = 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    head = len(head).to_bytes(8, "little") + head
    place = _place_of_checksum(head)
    assert place is not None

    # Write the tensors, then the checksum into its place in the header.
    with path.open("wb") as file:
        file.write(head)
        checksum = zlib.crc32(head)
        for name in names:
            data = _bytes_of(tensors[name])
            file.write(data)
            checksum = zlib.crc32(data, checksum)
        file.seek(place)
        file.write(b"%08x" % checksum)
        _sync(file)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns a file's tensors by name; they are mapped, so memory holds only what is touched."""
    return load_file(path)


def read_metadata(path: Path) -> dict[str, str]:
    """Returns the texts that `write_tensors` was given."""
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def write_json(path: Path, value: Any) -> None:
    """Writes a value as JSON, which has no NaN.

    Raises:
        OSError: the disk is full or not writable.
        ValueError: the value holds a number that is not finite.
    """
    text = json.dumps(value, allow_nan=False)
    with path.open("w") as file:
        file.write(text)
        _sync(file)


def sync_folder(folder: Path) -> None:
    """Makes the names of a folder's files last through a loss of power, on file systems that can."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without folders on a disk
            raise
    finally:
        os.close(number)


def checksum_in(path: Path) -> str | None:
    """Returns the CRC-32 that a file of tensors holds of itself; None for one that another program wrote."""
    return (read_metadata(path) or {}).get(_CHECKSUM)


def fault_of_tensors(path: Path, checksum: str | None) -> str | None:
    """Returns what is wrong with a file of tensors, as "is truncated"; None if it is whole, to its last byte.

    checksum: what `checksum_in` was when the file was written; None compares the file with its header alone.
    """
    try:
        read_metadata(path)
    except (SafetensorError, OSError) as error:
        return f"is missing, truncated or no safetensors file ({error})"
    if checksum is not None and checksum != _checksum_of(path):
        return "does not hold the bytes that were written (another CRC-32)"
    return None


def _checksum_of(path: Path) -> str | None:
    """Computes the CRC-32 of a file of tensors, if its header still has the place of one."""
    with path.open("rb") as file:
        length = file.read(8)
        head = length + file.read(int.from_bytes(length, "little"))
        place = _place_of_checksum(head)
        if place is None:
            return None
        checksum = zlib.crc32(head[:place] + _BLANK + head[place + len(_BLANK) :])
        while chunk := file.read(_CHUNK):
            checksum = zlib.crc32(chunk, checksum)
    return f"{checksum:08x}" if f"{checksum:08x}".encode() == head[place : place + len(_BLANK)] else None


def _place_of_checksum(head: bytes) -> int | None:
    key = f'"{_CHECKSUM}": "'.encode()
    return head.index(key) + len(key) if key in head else None


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(flat)


def _sync(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())
