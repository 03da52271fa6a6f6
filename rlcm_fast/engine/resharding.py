"""Loads a checkpoint of ZeRO 1 to 3 on another number of processes: it cuts the shards anew and writes nothing.

Every shard records which part of which weight it holds. So each process picks its new share out of all shards: float32
weights and moments by the weight's name, bit for bit. Files are mapped, not read: a process touches little more than
its share.

DeepSpeed's universal checkpoint is no substitute. It is a converter that writes every state twice (12 bytes per weight
each time). When it loads ZeRO-3, the groups of weights share one step count, so a model of more than one group (1e9
weights) counts every update several times. DeepSpeed's safe_set_full_... functions are none either: under ZeRO-3 they
fail if a weight's size does not divide by the number of processes.
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

Pieces = dict[str, dict[str, list[Tensor]]]  # kind (fp32 or a moment) -> name of a weight -> its flat parts in order


class _Share(NamedTuple):
    """The part of a weight that this process holds: from element `start` on, at `target` in its flat group."""

    name: str
    start: int
    target: slice


def shard_files(folder: Path) -> list[Path]:
    """Lists DeepSpeed's optimizer files in the order of ranks; none for ZeRO-0, whose state is in one piece."""
    files = folder.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    return sorted(files, key=lambda file: int(re.findall(r"zero_pp_rank_(\d+)_", file.name)[0]))


def load_resharded(engine: Any, folder: Path) -> None:
    """Loads a checkpoint's folder into DeepSpeed's engine; raises ValueError if its states cannot be cut anew."""
    shards = [_mapped(file)["optimizer_state_dict"] for file in shard_files(folder)]
    model = _mapped(sorted(folder.glob("*_model_states.pt"))[0])
    is_stage_3 = engine.zero_optimization_partition_weights()
    pieces = _pieces_of_stage_3(shards, model["param_shapes"]) if is_stage_3 else _pieces_of_stages_1_and_2(shards)
    if is_stage_3:
        engine.optimizer.checkpoint_event_prologue()
    engine.load_module_state_dict(model, custom_load_fn=load_trained)
    state = _rank_state(engine.optimizer, shards[0], pieces, is_stage_3)
    engine.optimizer.load_state_dict([state] * torch.distributed.get_world_size(), load_from_fp32_weights=True)
    if is_stage_3:
        engine.optimizer.checkpoint_event_epilogue()
    engine.lr_scheduler.load_state_dict(model["lr_scheduler"])
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, counter, model[counter])


def _mapped(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)  # DeepSpeed pickles its classes


def _pieces_of_stages_1_and_2(shards: Iterable[dict[str, Any]]) -> Pieces:
    pieces: Pieces = {}
    for shard in shards:
        for index, addresses in enumerate(shard["param_slice_mappings"]):
            flat = _flat_states(shard["single_partition_of_fp32_groups"][index], shard["base_optimizer_state"], index)
            _add(pieces, flat, ((name, at.start, at.numel) for name, at in addresses.items()))
    return pieces


def _pieces_of_stage_3(shards: list[dict[str, Any]], shapes: list[Mapping[str, torch.Size]]) -> Pieces:
    """Collects the parts of each weight; stage 3 cuts it into equal ones and pads the last."""
    pieces: Pieces = {}
    for rank, shard in enumerate(shards):
        for index, group in enumerate(shapes):
            flat = _flat_states(shard["fp32_flat_groups"][index], shard["optimizer_state_dict"], index)
            _add(pieces, flat, _cut(group, rank, len(shards)))
    return pieces


def _cut(group: Mapping[str, torch.Size], rank: int, num_shards: int) -> Iterator[tuple[str, int, int]]:
    """Yields the name, the place in the shard and the number of elements of each weight."""
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
            "cut; start as many processes as saved it, or start a new run from its export"
        )
    return {"fp32": weights, **{name: state[name] for name in _MOMENTS}}


def _add(pieces: Pieces, flat: dict[str, Tensor], places: Iterable[tuple[str, int, int]]) -> None:
    for name, start, length in places:
        for kind, values in flat.items():
            pieces.setdefault(kind, {}).setdefault(name, []).append(values.flatten()[start : start + length])


def _rank_state(optimizer: Any, saved: dict[str, Any], pieces: Pieces, is_stage_3: bool) -> dict[str, Any]:
    """Builds this rank's state as DeepSpeed would have saved it on this number of processes."""
    # Look up what DeepSpeed calls the parts of its state, and which share of each weight this rank holds.
    present = optimizer.state_dict()
    fp32, of_torch = (
        ("fp32_flat_groups", "optimizer_state_dict")
        if is_stage_3
        else ("single_partition_of_fp32_groups", "base_optimizer_state")
    )
    shares = _shares_of_stage_3(optimizer) if is_stage_3 else _shares_of_stages_1_and_2(optimizer)
    flat = optimizer.fp32_partitioned_groups_flat if is_stage_3 else optimizer.single_partition_of_fp32_groups

    # Fill this rank's flat groups from the pieces; each group gets its tensor of the step count, as each counts alone.
    kinds = {kind: [_assembled(pieces[kind], group, like) for group, like in zip(shares, flat)] for kind in pieces}
    step = saved[of_torch]["state"][0]["step"]
    states = {
        index: {"step": step.clone() if isinstance(step, Tensor) else step, **{m: kinds[m][index] for m in _MOMENTS}}
        for index in range(len(flat))
    }

    # Keep the saved settings of each group of parameters, with the parameters that it has here.
    groups = [
        {**saved_group, "params": group["params"]}
        for saved_group, group in zip(saved[of_torch]["param_groups"], present[of_torch]["param_groups"], strict=True)
    ]
    return {**present, fp32: kinds["fp32"], of_torch: {"state": states, "param_groups": groups}}


def _assembled(pieces: Mapping[str, list[Tensor]], shares: Iterable[_Share], like: Tensor) -> Tensor:
    """Builds this process's flat group (N,) float32; padding is 0."""
    flat = torch.zeros(like.numel())
    for share in shares:
        _copy_range(pieces[share.name], share.start, flat[share.target])
    return flat


def _copy_range(pieces: list[Tensor], start: int, target: Tensor) -> None:
    """Copies elements of the joined pieces to `target`, from element `start` on, as many as both have."""
    offset, end = 0, start + len(target)
    for piece in pieces:
        first, last = max(start, offset), min(end, offset + len(piece))
        if first < last:
            target[first - start : last - start] = piece[first - offset : last - offset]
        offset += len(piece)


def _shares_of_stages_1_and_2(optimizer: Any) -> list[list[_Share]]:
    """Lists this process's shares by group: it holds a stretch of all weights of the group, laid end to end."""
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
    """Lists this process's shares by group: it holds one of the equal parts of every weight."""
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
