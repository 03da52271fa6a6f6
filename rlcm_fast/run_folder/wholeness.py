"""Tells whether a checkpoint is whole, by the list of its files that is written when all of them are.

    index.json    {"files": {"engine/weights_00000_of_00001.safetensors": {"bytes": 7982936, "crc32": "0a5b..."}, ...}}

A file of tensors holds its CRC-32 itself (engine/tensor_files.py), computed while it was written; of the others, which
are small, the index has one of all bytes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

from rlcm_fast import parallel
from rlcm_fast.engine.old_checkpoints import fault_of_old
from rlcm_fast.engine.shards import is_of_this_process
from rlcm_fast.engine.tensor_files import checksum_in, fault_of_tensors, write_json
from rlcm_fast.finite_json import load_json

STATE, INDEX = "state.json", "index.json"
_TENSORS = ".safetensors"
_FIELDS_OF_STATE = {"format": int, "iteration": int, "queries": int, "tasks": dict}


def write_index(folder: Path) -> None:
    """Lists what all processes wrote; every rank must call.

    Each describes its own files, because a shared file system may show another's late.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and is_of_this_process(file)]
    own = [(file.relative_to(folder).as_posix(), _described(file)) for file in files]
    entries = parallel.all_gather_list(own)
    if parallel.is_main():
        write_json(folder / INDEX, {"files": dict(entries)})


def damage(folder: Path) -> str | None:
    """Returns what is wrong with a checkpoint's files, as "state.json is empty"; None if it is whole.

    It reads all files once, to compare their checksums. Checkpoints of format 1 have none.
    """
    # Without its state it is no checkpoint; the state's format says what else must be there.
    state = _read_json(folder / STATE)
    if isinstance(state, str):
        return state
    fault = _fault_of_state(state)
    if fault:
        return fault
    if "format" not in state:
        weights = {file.name: None for file in folder.glob(f"*{_TENSORS}")}
        return fault_of_old(folder, state.get("num_processes", 1)) or _fault_of_all(weights, folder)
    index = _read_json(folder / INDEX)
    if isinstance(index, str):
        return index
    entries = index.get("files")
    if not _is_list_of_files(entries):
        return f"{INDEX} is no list of files with their lengths and checksums"

    # Compare lengths before contents, which takes longer.
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size:,} of {entry['bytes']:,} bytes"
        if file.suffix != _TENSORS and entry["crc32"] != _checksum(file):
            return f"{name} does not hold the bytes that were written (another CRC-32)"
    tensors = {name: entry["crc32"] for name, entry in entries.items() if name.endswith(_TENSORS)}
    return _fault_of_all(tensors, folder)


def _is_list_of_files(entries: Any) -> TypeGuard[dict[str, dict[str, Any]]]:
    """Tells whether an index has the form that `write_index` gives it, and names the state."""
    if not isinstance(entries, dict) or STATE not in entries:
        return False
    return all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and "crc32" in entry
        for entry in entries.values()
    )


def _fault_of_state(state: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the fields of a state that is JSON; resume.py refuses one that lacks them."""
    for name, kind in _FIELDS_OF_STATE.items():
        value = state.get(name, kind())
        if not isinstance(value, kind) or isinstance(value, bool) or (kind is int and value < 0):
            return f"{STATE} has {name}={value}"
    return None


def _described(file: Path) -> dict[str, Any]:
    checksum = checksum_in(file) if file.suffix == _TENSORS else _checksum(file)
    return {"bytes": os.path.getsize(file), "crc32": checksum}


def _checksum(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"


def _read_json(file: Path) -> Mapping[str, Any] | str:
    """Returns what a file of JSON holds, or what is wrong with it."""
    if not file.is_file():
        return f"{file.name} is missing"
    text = file.read_bytes()
    try:
        value = load_json(text)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    return f"{file.name} is {'no JSON' if text else 'empty'}"


def _fault_of_all(checksums: Mapping[str, str | None], folder: Path) -> str | None:
    """Returns the first fault of files of tensors, which are read at the same time."""
    with ThreadPoolExecutor(max_workers=4) as pool:
        paths = [folder / name for name in checksums]
        faults = list(pool.map(fault_of_tensors, paths, checksums.values()))
    return next((f"{name} {fault}" for name, fault in zip(checksums, faults) if fault), None)
