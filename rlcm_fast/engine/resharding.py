"""A checkpoint of ZeRO 1 to 3 on another number of processes: its shards are cut anew on loading, nothing is written.

Every shard says which part of which weight it holds, so a process picks what is now its own out of all of them: float32
weights and moments by the weight's name, bit for bit. Files are mapped, not read: a process touches its own share and
little more.

Why not DeepSpeed's universal checkpoint: it is a converter that writes every state twice (12 bytes a weight each time),
and on loading ZeRO-3 it lets the groups of weights share one step count, so a model of more than one group (1e9
weights) counts every update several times. Why not its safe_set_full_...: under ZeRO-3 they fail where a weight's
size does not divide by the number of processes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlcm_fast.engine.base import load_trained

_MOMENTS = ("exp_avg", "exp_avg_sq")

Pieces = dict[str, dict[str, list[Tensor]]]  # kind (fp32 or a moment) -> name of a weight -> its parts, flat, in order


class _Share(NamedTuple):
    """What this process holds of a weight: `target` in its flat group, from element `start` of the weight on."""

    name: str
    start: int
    target: slice


def shard_files(folder: Path) -> list[Path]:
    """DeepSpeed's optimizer files in the order of ranks; none for ZeRO-0, whose state is in one piece."""
    files = folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(files, key=lambda file: int(re.findall(r"zero_pp_rank_(\d+)_", file.name)[0]))


def load_resharded(engine: Any, folder: Path) -> None:
    """Into DeepSpeed's engine; raises ValueError if the states cannot be cut elsewhere than where they were."""
    shards = [_mapped(file)["optimizer_state_dict"] for file in shard_files(folder)]
    model = _mapped(sorted(folder.glob("*_model_states.pt"))[0])
    is_stage_3 = engine.zero_optimization_partition_weights()
    pieces = _pieces_of_stage_3(shards, model["param_shapes"]) if is_stage_3 else _pieces_of_stages_1_and_2(shards)
    if is_stage_3:
        engine.optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(model, custom_load_fn=load_trained)
    own = _own_state(engine.optimizer, shards[0], pieces, is_stage_3)
    engine.optimizer.load_state_dict([own] * torch.distributed.get_world_size(), load_from_fp32_weights=True)
    if is_stage_3:
        engine.optimizer.checkpoint_event_epilogue()
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])


def _mapped(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)  # DeepSpeed pickles objects of its own


def _pieces_of_stages_1_and_2(shards: Iterable[dict[str, Any]]) -> Pieces:
    pieces: Pieces = {}
    for shard in shards:
        for index, addresses in enumerate(shard["param_slice_mappings"]):
            flat = _flat_states(shard["single_partition_of_fp32_groups"][index], shard["base_optimizer_state"], index)
            _add(pieces, flat, ((name, at.start, at.numel) for name, at in addresses.items()))
    return pieces


def _pieces_of_stage_3(shards: list[dict[str, Any]], shapes: list[Mapping[str, torch.Size]]) -> Pieces:
    """Each weight is cut into equal parts, the last ones padded."""
    pieces: Pieces = {}
    for rank, shard in enumerate(shards):
        for index, group in enumerate(shapes):
            flat = _flat_states(shard["fp32_flat_groups"][index], shard["optimizer_state_dict"], index)
            _add(pieces, flat, _cut(group, rank, len(shards)))
    return pieces


def _cut(group: Mapping[str, torch.Size], rank: int, num_shards: int) -> Iterator[tuple[str, int, int]]:
    """Name, place in the shard and number of elements of each weight."""
    offset = 0
    for name, shape in group.items():
        length = -(-shape.numel() // num_shards)
        yield name, offset, max(0, min(length, shape.numel() - rank * length))
        offset += length


def _flat_states(weights: Tensor, optimizer: dict[str, Any], index: int) -> dict[str, Tensor]:
    state = optimizer["state"][index]
    if not {"step", *_MOMENTS} == set(state):
        raise ValueError(
            "resume: the checkpoint's optimizer has 8-bit states in blocks, which another number of processes would "
            "cut; start as many processes as it was saved by, or start a new run from its export"
        )
    return {"fp32": weights, **{name: state[name] for name in _MOMENTS}}


def _add(pieces: Pieces, flat: dict[str, Tensor], places: Iterable[tuple[str, int, int]]) -> None:
    for name, start, length in places:
        for kind, values in flat.items():
            pieces.setdefault(kind, {}).setdefault(name, []).append(values.flatten()[start : start + length])


def _own_state(optimizer: Any, saved: dict[str, Any], pieces: Pieces, is_stage_3: bool) -> dict[str, Any]:
    """A rank's state as DeepSpeed would have saved it on this number of processes."""
    own = optimizer.state_dict()
    fp32, of_torch = (
        ("fp32_flat_groups", "optimizer_state_dict")
        if is_stage_3
        else ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    shares = _shares_of_stage_3(optimizer) if is_stage_3 else _shares_of_stages_1_and_2(optimizer)
    flat = optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups
    kinds = {kind: [_assembled(pieces[kind], group, like) for group, like in zip(shares, flat)] for kind in pieces}
    step = saved[of_torch]["state"][0]["step"]  # a tensor of each group's own: they count by themselves
    states = {
        index: {"step": step.clone() if isinstance(step, Tensor) else step, **{m: kinds[m][index] for m in _MOMENTS}}
        for index in range(len(flat))
    }
    groups = [
        {**group, "params": mine["params"]}
        for group, mine in zip(saved[of_torch]["param_groups"], own[of_torch]["param_groups"], strict=True)
    ]
    return {**own, fp32: kinds["fp32"], of_torch: {"state": states, "param_groups": groups}}


def _assembled(pieces: Mapping[str, list[Tensor]], shares: Iterable[_Share], like: Tensor) -> Tensor:
    """This process's flat group; what is padding is 0."""
    flat = torch.zeros(like.numel())
    for share in shares:
        _copy_range(pieces[share.name], share.start, flat[share.target])
    return flat


def _copy_range(pieces: list[Tensor], start: int, target: Tensor) -> None:
    """Copies the elements from `start` on of the pieces joined, as many as the target takes and there are."""
    offset, end = 0, start + len(target)
    for piece in pieces:
        first, last = max(start, offset), min(end, offset + len(piece))
        if first < last:
            target[first - start : last - start] = piece[first - offset : last - offset]
        offset += len(piece)


def _shares_of_stages_1_and_2(optimizer: Any) -> list[list[_Share]]:
    """All weights of a group lie one after the other, and a process holds a stretch of that."""
    shares = []
    for group in optimizer.bit16_groups:
        mapped = [(optimizer.param_names[weight], weight._hp_mapping) for weight in group if weight._hp_mapping]
        shares.append(
            [
                _Share(name, at.lp_fragment_address.start, slice(first, first + at.hp_fragment_address.numel))
                for name, at in mapped
                for first in [at.hp_fragment_address.start]
            ]
        )
    return shares


def _shares_of_stage_3(optimizer: Any) -> list[list[_Share]]:
    rank, num_shards = torch.distributed.get_rank(), torch.distributed.get_world_size()
    shares = []
    for group in optimizer.fp16_groups:
        offset, of_group = 0, []
        for weight in group:
            length = -(-weight.ds_numel // num_shards)
            of_group.append(_Share(optimizer.param_names[weight], rank * length, slice(offset, offset + length)))
            offset += length
        shares.append(of_group)
    return shares
