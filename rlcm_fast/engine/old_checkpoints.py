"""Reads the checkpoints of format 1, which have no shards: deepspeed/ by DeepSpeed, or engine.pt.

Those are pickles: reading one runs whatever code is in it, so the user must allow it. Nothing here writes. Files are
mapped, as those of shards are.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast.engine.replicas import persistent_buffers, trained_weights
from rlcm_fast.engine.shards import BY_ELEMENT, FOLDER, Group, Part, Saved, Shard, read_shards

_OF_BITSANDBYTES = "__bnb_optimizer_quant_state__"  # the key under which its state_dict hides 8-bit states


def read_engine(folder: Path, network: nn.Module, trusts_old: bool) -> Saved:
    """Returns what a checkpoint's folder holds of an engine; `network` names the weights in the optimizer's order.

    Raises:
        ValueError: there is nothing of an engine in the folder, or it is of format 1 and the user does not trust it.
    """
    if (folder / FOLDER).is_dir():
        return read_shards(folder)
    if not (folder / "deepspeed").is_dir() and not (folder / "engine.pt").is_file():
        raise ValueError(f"resume={folder} holds no state of an engine: it has no {FOLDER}/; give another checkpoint")
    check_trust(folder, trusts_old)
    shards = _of_direct(folder, network) if (folder / "engine.pt").is_file() else _of_deepspeed(folder, network)
    return Saved(shards)


def check_trust(folder: Path, trusts_old: bool) -> None:
    """Raises ValueError if the user does not trust the checkpoint, which is of format 1."""
    if not trusts_old:
        raise ValueError(
            f"resume={folder} is of an older version, whose checkpoints are pickles: reading one runs any code that is "
            "in it; if you trust where it comes from, set trust_old_checkpoint=true"
        )


def fault_of_old(folder: Path, num_processes: int) -> str | None:
    """Returns what is wrong with the files that `read_engine` would read, by their names and ends; None if nothing."""
    files = [*folder.glob("engine.pt"), *sorted((folder / "deepspeed").glob("*.pt"))]
    if not files:
        return "it has neither engine.pt nor files in deepspeed/"
    truncated = [file.relative_to(folder) for file in files if not zipfile.is_zipfile(file)]
    if truncated:
        return f"{truncated[0]} is truncated"
    num_partitions = sum("_optim_states" in file.name for file in files)
    if num_partitions not in (0, num_processes):
        return f"deepspeed/ has {num_partitions} of {num_processes} optimizer files"
    return None


def _of_direct(folder: Path, network: nn.Module) -> list[Shard]:
    saved = _mapped(folder / "engine.pt")
    return [_shard_of_weights(saved["network"], saved["optimizer"], {"schedule": saved["num_updates"]}, network)]


def _of_deepspeed(folder: Path, network: nn.Module) -> list[Shard]:
    # Read what describes the whole: the schedule, and the shapes if the states are partitioned.
    models = sorted((folder / "deepspeed").glob("*_model_states.pt"))
    model = _mapped(models[0])
    counters = {"schedule": model["lr_scheduler"]["last_epoch"]}
    counters |= {name: model[name] for name in ("global_steps", "global_samples", "skipped_steps")}
    files = (folder / "deepspeed").glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")
    files = sorted(files, key=lambda file: int(re.findall(r"zero_pp_rank_(\d+)_", file.name)[0]))
    if not files:
        return [_shard_of_weights(model["module"], model["optimizer"], counters, network)]

    # Read the partitions.
    states = [_mapped(file)["optimizer_state_dict"] for file in files]
    is_stage_3 = "fp32_flat_groups" in states[0]
    shards = _of_stage_3(states, model["param_shapes"]) if is_stage_3 else _of_stages_1_and_2(states, model)
    buffers = [_whole(name, model["module"][name]) for name in persistent_buffers(network)]
    shards = [Shard(parts, counters, groups) for parts, groups in shards]
    return [Shard([*shards[0].parts, *buffers], counters, shards[0].groups), *shards[1:]]


def _mapped(file: Path) -> dict[str, Any]:
    return torch.load(file, map_location="cpu", mmap=True, weights_only=False)


def _shard_of_weights(
    weights: Mapping[str, Tensor], optimizer: Mapping[str, Any], counters: Mapping[str, int], network: nn.Module
) -> Shard:
    """Builds the shard of a process that held all weights; the optimizer numbers them in the network's order."""
    states = dict(zip(trained_weights(network), _unwrapped(optimizer)))
    parts = [_whole(name, weight, states.get(name, {})) for name, weight in weights.items()]
    return Shard(parts, counters)


def _unwrapped(optimizer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the states by the weight's number; those before a first update are empty."""
    numbers = [number for group in optimizer["param_groups"] for number in group["params"]]
    states = [dict(optimizer["state"].get(number, {})) for number in numbers]
    hidden = [state.pop(_OF_BITSANDBYTES, {}) for state in states]
    return [state | more for state, more in zip(states, hidden)]


def _whole(name: str, weight: Tensor, state: Mapping[str, Any] | None = None) -> Part:
    states, step = _tensors_and_step(state or {})
    return Part(name, tuple(weight.shape), 0, weight, states, step, is_whole=True)


def _tensors_and_step(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], int | None]:
    tensors = {kind: value for kind, value in state.items() if kind != "step"}
    return tensors, int(state["step"]) if state else None


_Partition = tuple[list[Part], list[Group]]


def _of_stages_1_and_2(shards: Sequence[Mapping[str, Any]], model: Mapping[str, Any]) -> Iterator[_Partition]:
    """Yields the parts of each process: a stretch of all weights of the group, laid end to end."""
    shapes = {name: shape for group in model["param_shapes"] for name, shape in group.items()}
    ends = dict.fromkeys(shapes, 0)
    for shard in shards:
        flats, states, places = shard["single_partition_of_fp32_groups"], shard["base_optimizer_state"], []
        for index, addresses in enumerate(shard["param_slice_mappings"]):
            for name, at in addresses.items():
                places.append((name, shapes[name], ends[name], index, slice(at.start, at.start + at.numel)))
                ends[name] += at.numel
        yield _partition(flats, _unwrapped(states), places)


def _of_stage_3(shards: Sequence[Mapping[str, Any]], shapes: Sequence[Mapping[str, Any]]) -> Iterator[_Partition]:
    """Yields the parts of each process: one of the equal parts of every weight; the last one is padded."""
    for rank, shard in enumerate(shards):
        places = []
        for index, group in enumerate(shapes):
            offset = 0
            for name, shape in group.items():
                length = -(-shape.numel() // len(shards))
                start = min(rank * length, shape.numel())
                held = slice(offset, offset + min(length, shape.numel() - start))
                places.append((name, shape, start, index, held))
                offset += length
        yield _partition(shard["fp32_flat_groups"], _unwrapped(shard["optimizer_state_dict"]), places)


def _partition(flats: Sequence[Tensor], states: Sequence[Mapping[str, Any]], places: Sequence[tuple]) -> _Partition:
    """Cuts a process's flat groups at `places`: name, shape, start, group and slice of each part."""
    tensors, steps = zip(*(_tensors_and_step(state) for state in states))
    are_by_element = all(group.keys() <= BY_ELEMENT for group in tensors)
    parts = []
    for name, shape, start, index, held in places:
        cut = {kind: state.flatten()[held] for kind, state in tensors[index].items()} if are_by_element else {}
        parts.append(Part(name, tuple(shape), start, flats[index].detach().flatten()[held], cut, steps[index]))
    return parts, [] if are_by_element else [Group(*pair) for pair in zip(tensors, steps)]
