"""The first thing in which two run folders differ, bit for bit: metrics, grids, checkpoints, exported weights.

Times (of files too, as two checkouts of a commit hold the same models with other times), memory and what names the run
itself (config.yaml, environment.json) are left out; so are DeepSpeed's files, in which the same numbers lie in another
layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

MISSING = "(missing)"
_TIME_OF_A_FILE = ".mtime_ns"  # in the fingerprint of a model's files; their sizes and hashes are compared


def first_difference(old: Path, new: Path) -> str:
    """Where and how run folder `new` differs from `old`; empty where it does not."""
    return (
        _in_metrics(old / "metrics.jsonl", new / "metrics.jsonl")
        or _in_file_names(old, new)
        or _in_states(old, new)
        or _in_tensors(old, new)
        or _in_grids(old, new)
    )


def is_measured(key: str) -> bool:
    """Whether a metric is a matter of the clock or of the allocator."""
    return key.startswith(("seconds/", "memory/")) or key == "images_per_second"


def compared_files(run_dir: Path) -> list[Path]:
    """The files of a run that are compared, relative to its folder."""
    found = []
    for pattern in ("metrics.jsonl", "grids/*.png", "checkpoints/*/state.json", "**/*.safetensors"):
        found += [path.relative_to(run_dir) for path in run_dir.glob(pattern)]
    return sorted(found)


def _in_metrics(old: Path, new: Path) -> str:
    old_lines, new_lines = _lines(old), _lines(new)
    if len(old_lines) != len(new_lines):
        return f"metrics.jsonl has {len(old_lines)} lines, now {len(new_lines)}"
    for number, (before, after) in enumerate(zip(old_lines, new_lines, strict=True), start=1):
        difference = _in_values(before, after)
        if difference:
            return f"metrics.jsonl, line {number}: {difference}"
    return ""


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        line = json.loads(text)
        lines.append({key: value for key, value in line.items() if not is_measured(key)})
    return lines


def _in_values(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Compares numbers by their shortest text, which is exact and in which nan equals nan."""
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key, MISSING), new.get(key, MISSING)
        if json.dumps(before) != json.dumps(after):
            return f"{key} was {before}, now {after}"
    return ""


def _in_file_names(old: Path, new: Path) -> str:
    before, after = set(compared_files(old)), set(compared_files(new))
    if not any(_is_shard(path) for path in before):  # checkpoints were pickles before they were shards
        after = {path for path in after if not _is_shard(path)}
    for path in sorted(before ^ after):
        return f"{path} is {'new' if path in after else 'missing'}"
    return ""


def _is_shard(path: Path) -> bool:
    return path.parent.name == "engine"


def _in_states(old: Path, new: Path) -> str:
    """Compares what the old state.json holds but times; a key that is new there is no difference."""
    for path in compared_files(old):
        if path.name != "state.json":
            continue
        before = _flat(json.loads((old / path).read_text()))
        before = {key: value for key, value in before.items() if not key.endswith(_TIME_OF_A_FILE)}
        after = _flat(json.loads((new / path).read_text()))
        difference = _in_values(before, {key: value for key, value in after.items() if key in before})
        if difference:
            return f"{path}: {difference}"
    return ""


def _flat(state: Any, place: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted place; lists are leaves."""
    if not isinstance(state, dict):
        return {place: state}
    leaves: dict[str, Any] = {}
    for key, value in state.items():
        leaves |= _flat(value, f"{place}.{key}" if place else key)
    return leaves


def _in_tensors(old: Path, new: Path) -> str:
    for path in compared_files(old):
        if path.suffix != ".safetensors":
            continue
        difference = _in_weights(load_file(old / path), load_file(new / path))
        if difference:
            return f"{path}: {difference}"
    return ""


def _in_weights(old: Mapping[str, Tensor], new: Mapping[str, Tensor]) -> str:
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            return f"{name} is {'new' if name in new else 'missing'}"
        difference = _in_tensor(old[name], new[name])
        if difference:
            return f"{name} {difference}"
    return ""


def _in_tensor(old: Tensor, new: Tensor) -> str:
    """Compares bits, so that a nan equals itself and 0 differs from -0."""
    if (old.shape, old.dtype) != (new.shape, new.dtype):
        return f"was {tuple(old.shape)} {old.dtype}, now {tuple(new.shape)} {new.dtype}"
    if old.numel() == 0:
        return ""
    old, new = old.flatten(), new.flatten()
    differs = (old.view(torch.uint8) != new.view(torch.uint8)).view(old.numel(), -1).any(1)
    if not differs.any():
        return ""
    place = int(differs.nonzero()[0])
    return (
        f"differs in {int(differs.sum())} of {old.numel()} numbers, the first at {place}: was {old[place].item()}, "
        f"now {new[place].item()}"
    )


def _in_grids(old: Path, new: Path) -> str:
    for path in compared_files(old):
        if path.suffix == ".png" and (old / path).read_bytes() != (new / path).read_bytes():
            return f"{path} is another picture"
    return ""
