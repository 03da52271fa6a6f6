"""Shards of a checkpoint: what each process wrote of the trained weights and of their optimizer's states.

    engine/shard_00001_of_00002.json            names, shapes, where each part starts, step counts, counters
    engine/weights_00001_of_00002.safetensors   trained weights, as float32 master weights where there are some
    engine/states_00001_of_00002.safetensors    the optimizer's states, each in its dtype: "exp_avg/NAME"

Every process writes its own shard, and no two wait for each other. A shard says which part of which weight it holds, so
any number of processes can read them, under any stage of ZeRO: each picks its share out of all shards, bit for bit.
Files are mapped, so a process touches little more than its share. The exception are states in 8-bit blocks under ZeRO 1
and 2. They belong to a flat group of weights, and only as many processes as wrote them can read them.
"""

# D dimensions of a weight, N elements of a part

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.engine.tensor_files import read_tensors, sync_folder, write_json, write_tensors

FOLDER = "engine"
_SUFFIX = re.compile(r"_\d{5}_of_\d{5}$")
BY_ELEMENT = {"exp_avg", "exp_avg_sq"}  # states that can be cut where their weight is cut


@dataclass(frozen=True)
class Part:
    """A stretch of a weight and of its states, all (N,); or a whole weight, with states of any shape."""

    name: str
    shape: tuple[int, ...]  # (D,) of the whole weight
    start: int  # the first element, in the order of a contiguous weight
    weight: Tensor  # (N,) if it is a stretch
    states: Mapping[str, Tensor]
    step: int | None  # updates that the states have seen; None: there are no states yet
    is_whole: bool = False


@dataclass(frozen=True)
class Group:
    """States of a flat group of weights that cannot be cut, because they have blocks."""

    states: Mapping[str, Tensor]
    step: int


@dataclass(frozen=True)
class Shard:
    """What one process writes; `counters`: "updates", "schedule", ..., the same on all processes."""

    parts: Sequence[Part]
    counters: Mapping[str, int]
    groups: Sequence[Group] = field(default_factory=tuple)


class _Piece(NamedTuple):
    start: int
    values: Tensor
    is_whole: bool


def write_shard(folder: Path, shard: Shard) -> None:
    """Writes this process's shard into a checkpoint's folder; it is on the disk when the call returns."""
    # Name the tensors; a state keeps the order that its elements have in memory, which blocks of 8 bits follow.
    weights = {part.name: part.weight for part in shard.parts}
    states: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for part in shard.parts:
        orders = {kind: _memory_order(state) for kind, state in part.states.items()}
        states |= {f"{kind}/{part.name}": state.permute(orders[kind]) for kind, state in part.states.items()}
        changed = {kind: order for kind, order in orders.items() if order != sorted(order)}
        entries[part.name] = {
            "shape": list(part.shape),
            "start": part.start,
            "is_whole": part.is_whole,
            "step": part.step,
            "states": list(part.states),
            "orders": changed,
        }
    for index, group in enumerate(shard.groups):
        states |= {f"group_{index}/{kind}": state for kind, state in group.states.items()}
    groups = [{"step": group.step, "states": list(group.states)} for group in shard.groups]

    # Write the files, those with names last.
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)  # a shared file system may show the folder late
    write_tensors(_file(folder, "weights"), weights)
    write_tensors(_file(folder, "states"), states)
    counters = dict(shard.counters)
    write_json(_file(folder, "shard"), {"counters": counters, "parts": entries, "groups": groups})
    sync_folder(folder / FOLDER)


def is_of_this_process(file: Path) -> bool:
    """Tells whether this process wrote a file of the checkpoint; files that are no shards are the main process's."""
    shard = _SUFFIX.search(file.stem)
    return shard[0] == _suffix() if shard else parallel.is_main()


class Saved:
    """What all shards of a checkpoint hold together."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Raises ValueError if the parts of a weight do not make it whole."""
        self.counters = shards[0].counters
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.steps: dict[str, int | None] = {}
        self._groups = [shard.groups for shard in shards]
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}
        for shard in shards:
            for part in shard.parts:
                self.shapes[part.name], self.steps[part.name] = part.shape, part.step
                for kind, values in {"weight": part.weight, **part.states}.items():
                    pieces = self._pieces.setdefault(part.name, {}).setdefault(kind, [])
                    pieces.append(_Piece(part.start, values, part.is_whole))
        for name, shape in self.shapes.items():
            present = sum(piece.values.numel() for piece in self._pieces[name]["weight"])
            if present != math.prod(shape):
                raise ValueError(f"resume: {present:,} of the {math.prod(shape):,} elements of {name} are there")

    @property
    def has_groups(self) -> bool:
        """Tells whether the states belong to flat groups of weights."""
        return any(self._groups)

    def groups_of_this_process(self) -> Sequence[Group]:
        """Returns the flat groups' states; raises ValueError if another number of processes saved them."""
        if len(self._groups) != parallel.world_size():
            raise ValueError(
                "resume: the checkpoint's optimizer has 8-bit states in blocks, which another number of processes would"
                f" cut; start as many processes as saved it ({len(self._groups)}), or start a new run from its weights"
            )
        return self._groups[parallel.rank()]

    def kinds(self, name: str) -> set[str]:
        """Returns the names of a weight's states."""
        return self._pieces[name].keys() - {"weight"}

    def whole(self, kind: str, name: str) -> Tensor:
        """Returns a whole weight (kind "weight") or one of its states, in its shape, dtype and memory order."""
        pieces = sorted(self._pieces[name][kind], key=lambda piece: piece.start)
        if pieces[0].is_whole:
            return pieces[0].values
        return torch.cat([piece.values for piece in pieces]).view(self.shapes[name])

    def copy(self, kind: str, name: str, start: int, target: Tensor) -> None:
        """Copies elements of a weight or state from `start` on to `target` (N,), N of them."""
        end = start + len(target)
        for piece in self._pieces[name][kind]:
            values = piece.values.flatten()
            first, last = max(start, piece.start), min(end, piece.start + len(values))
            if first < last:
                target[first - start : last - start] = values[first - piece.start : last - piece.start]


def read_shards(folder: Path) -> Saved:
    """Maps the shards of all processes that wrote a checkpoint; raises ValueError if one is missing."""
    files = sorted((folder / FOLDER).glob("shard_*_of_*.json"))
    if not files or len(files) != int(files[0].stem[-5:]):
        raise ValueError(f"resume={folder} lacks shards: {FOLDER}/ has {len(files)} of them; give another checkpoint")
    try:
        return Saved([_read_shard(file) for file in files])
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError, SafetensorError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"resume={folder}: its shards are damaged ({reason}); give another checkpoint") from error


def check_same_weights(saved: Mapping[str, Sequence[int]], present: Mapping[str, Sequence[int]]) -> None:
    """Compares names and shapes of the trained weights; raises ValueError if they differ."""
    misfits = {name for name in saved.keys() | present.keys() if _shape(saved, name) != _shape(present, name)}
    if misfits:
        raise ValueError(
            f"resume: the checkpoint and this run do not train the same weights ({min(misfits)}, for example); keep "
            "the model and the lora settings that the checkpoint was saved with"
        )


def _shape(shapes: Mapping[str, Sequence[int]], name: str) -> tuple[int, ...] | None:
    return tuple(shapes[name]) if name in shapes else None


def _read_shard(file: Path) -> Shard:
    described = json.loads(file.read_text())
    kinds = ("weights", "states")
    weights, states = (read_tensors(file.with_name(f"{_named(file, kind)}.safetensors")) for kind in kinds)
    parts = []
    for name, entry in described["parts"].items():
        of_part = {kind: states[f"{kind}/{name}"] for kind in entry["states"]}
        for kind, order in entry["orders"].items():
            of_part[kind] = of_part[kind].permute(_inverse(order))
        shape, start = tuple(entry["shape"]), entry["start"]
        parts.append(Part(name, shape, start, weights[name], of_part, entry["step"], entry["is_whole"]))
    groups = [
        Group({kind: states[f"group_{index}/{kind}"] for kind in group["states"]}, group["step"])
        for index, group in enumerate(described["groups"])
    ]
    return Shard(parts, described["counters"], groups)


def _file(folder: Path, kind: str) -> Path:
    return folder / FOLDER / f"{kind}{_suffix()}.{'json' if kind == 'shard' else 'safetensors'}"


def _suffix() -> str:
    return f"_{parallel.rank():05d}_of_{parallel.world_size():05d}"


def _named(file: Path, kind: str) -> str:
    return kind + file.stem.removeprefix("shard")


def _memory_order(tensor: Tensor) -> list[int]:
    """Returns the dimensions from the one with the largest stride to the one with the smallest."""
    return sorted(range(tensor.ndim), key=lambda dimension: -tensor.stride(dimension))


def _inverse(order: Iterable[int]) -> list[int]:
    places = list(order)
    return [places.index(dimension) for dimension in range(len(places))]
