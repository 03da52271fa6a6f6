"""Saves and loads what each process holds under ZeRO 1 to 3; any number of processes may load it, at any of the stages.

DeepSpeed lays the weights of a group end to end, in float32, and gives each process a stretch of that (stages 1 and 2),
or of every weight one of as many equal parts as there are processes (stage 3). Its optimizer sees one flat tensor a
group. A shard (shards.py) names the weights in it, so loading cuts the flat tensors anew and writes nothing.

DeepSpeed's own checkpoints are pickles: whoever reads them runs code. Its universal checkpoint is no substitute: it is
a converter that writes every state twice (12 bytes per weight each time), and it pickles, too. When it loads ZeRO-3,
the groups of weights share one step count, so a model of more than one group (1e9 weights) counts every update several
times. DeepSpeed's safe_set_full_... functions are none either: under ZeRO-3 they fail if a weight's size does not
divide by the number of processes.
"""

# N elements of a share

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlcm_fast import parallel
from rlcm_fast.engine.optimizers import load_state
from rlcm_fast.engine.replicas import buffer_parts, persistent_buffers, trained_weights
from rlcm_fast.engine.shards import BY_ELEMENT, Group, Part, Saved, Shard, check_same_weights, write_shard


class _Share(NamedTuple):
    """The part of a weight that this process holds: from element `start` on, at `target` in a flat group."""

    name: str
    shape: tuple[int, ...]  # of the whole weight
    start: int
    group: int
    target: slice  # N elements


def save_partition(folder: Path, engine: Any, counters: Mapping[str, int]) -> None:
    """Writes this process's shard of what DeepSpeed's engine holds: master weights and states."""
    flat, optimizer = _flat_groups(engine), engine.optimizer.optimizer
    are_by_element = all(_states(optimizer, group).keys() <= BY_ELEMENT for group in flat)
    parts = [_part(share, flat[share.group], optimizer, are_by_element) for share in _shares(engine)]
    groups = [] if are_by_element else [_group(group, optimizer) for group in flat]
    write_shard(folder, Shard(parts + buffer_parts(engine.module) * parallel.is_main(), counters, groups))


@torch.no_grad()
def load_partition(engine: Any, saved: Saved) -> None:
    """Restores this process's part of weights and states; raises ValueError if they are not those of this run."""
    # Refuse what does not fit, before anything changes.
    flat, optimizer, shares = _flat_groups(engine), engine.optimizer.optimizer, list(_shares(engine))
    check_same_weights(saved.shapes, _shapes(engine.module))
    groups = saved.groups_of_this_process() if saved.has_groups else _assembled(saved, shares, flat)
    _check_groups(groups, flat)

    # Fill the flat groups and the buffers.
    is_stage_3 = engine.zero_optimization_partition_weights()
    if is_stage_3:
        engine.optimizer.checkpoint_event_prologue()
    for share in shares:
        saved.copy("weight", share.name, share.start, flat[share.group].detach()[share.target])
    for name, buffer in persistent_buffers(engine.module).items():
        buffer.copy_(saved.whole("weight", name))
    for group, states in zip(flat, groups, strict=True):
        load_state(optimizer, group, states.states if states else {}, states.step if states else None)

    # Give the network its weights from them, as DeepSpeed does after a step.
    if is_stage_3:
        for index in range(len(flat)):
            engine.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        engine.optimizer.checkpoint_event_epilogue()
    else:
        engine.optimizer.update_lp_params()


def _flat_groups(engine: Any) -> list[nn.Parameter]:
    """Returns this process's float32 stretches of all groups; what the optimizer steps, and what its states belong to.

    Stages 1 and 2 have two implementations, by the dtype in which gradients add up; both tell their optimizer so.
    """
    if engine.zero_optimization_partition_weights():
        return engine.optimizer.fp32_partitioned_groups_flat
    return [group["params"][0] for group in engine.optimizer.optimizer.param_groups]


def _shares(engine: Any) -> Iterator[_Share]:
    if engine.zero_optimization_partition_weights():
        return _shares_of_stage_3(engine)
    return _shares_of_stages_1_and_2(engine.module)


def _shares_of_stages_1_and_2(network: nn.Module) -> Iterator[_Share]:
    """Yields this process's shares: it holds a stretch of all weights of the group, laid end to end."""
    for name, weight in trained_weights(network).items():
        mapping = vars(weight)["_hp_mapping"]
        if mapping:  # None if another process holds all of it
            first, length = mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel
            start, group = mapping.lp_fragment_address.start, mapping.param_group_index
            yield _Share(name, tuple(weight.shape), start, group, slice(first, first + length))


def _shares_of_stage_3(engine: Any) -> Iterator[_Share]:
    """Yields this process's shares: it holds one of the equal parts of every weight, and the last one is padded."""
    rank, num_shards = parallel.rank(), parallel.world_size()
    for index, group in enumerate(engine.optimizer.fp16_groups):
        offset = 0
        for weight in group:
            length = -(-weight.ds_numel // num_shards)
            start = min(rank * length, weight.ds_numel)
            held = slice(offset, offset + min(length, weight.ds_numel - start))
            yield _Share(engine.optimizer.param_names[weight], tuple(weight.ds_shape), start, index, held)
            offset += length


def _shapes(network: nn.Module) -> dict[str, Any]:
    """Returns the shapes of what is saved; stage 3 leaves a weight only an empty tensor and the note of its shape."""
    shapes = {name: vars(weight).get("ds_shape", weight.shape) for name, weight in trained_weights(network).items()}
    return shapes | {name: tensor.shape for name, tensor in persistent_buffers(network).items()}


def _states(optimizer: Optimizer, group: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(group, {})
    return {kind: value for kind, value in state.items() if kind != "step"}


def _step(optimizer: Optimizer, group: Tensor) -> int | None:
    state = optimizer.state.get(group, {})
    return int(state["step"]) if state else None


def _part(share: _Share, flat: Tensor, optimizer: Optimizer, with_states: bool) -> Part:
    states = _states(optimizer, flat) if with_states else {}
    cut = {kind: state[share.target] for kind, state in states.items()}
    weight = flat.detach()[share.target]
    return Part(share.name, share.shape, share.start, weight, cut, _step(optimizer, flat))


def _group(flat: Tensor, optimizer: Optimizer) -> Group:
    step = _step(optimizer, flat)
    assert step is not None, "all groups step together"
    return Group(_states(optimizer, flat), step)


def _assembled(saved: Saved, shares: Sequence[_Share], flat: Sequence[Tensor]) -> list[Group | None]:
    """Returns the states of this process's flat groups, cut out of the weights' states; None before the first update.

    Padding is 0, as in a run that never stopped.
    """
    # One step count and one kind of states for all weights: those of a flat group step together.
    names = [name for name in saved.shapes if saved.kinds(name) or saved.steps[name] is not None]
    steps, kinds = {saved.steps[name] for name in names}, set().union(*(saved.kinds(name) for name in names))
    if not names:
        return [None] * len(flat)
    if len(steps) > 1 or not kinds <= BY_ELEMENT:
        raise ValueError(
            f"resume: the checkpoint's optimizer has states of each weight ({', '.join(sorted(kinds))}) that ZeRO "
            "cannot join; keep engine.zero_stage and optimizer.name, or start a new run from its weights"
        )

    # Copy this process's share of every weight.
    groups = [{kind: torch.zeros_like(group.detach()) for kind in kinds} for group in flat]
    for share in shares:
        for kind in kinds:
            saved.copy(kind, share.name, share.start, groups[share.group][kind][share.target])
    return [Group(states, max(step for step in steps if step is not None)) for states in groups]


def _check_groups(groups: Sequence[Group | None], flat: Sequence[Tensor]) -> None:
    """Refuses states in blocks of groups that this run cuts in another way."""
    saved = [states.states["state1"].numel() for states in groups if states and "state1" in states.states]
    present = [group.numel() for group in flat]
    if saved and saved != present:
        raise ValueError(
            f"resume: the checkpoint's optimizer has 8-bit states of flat groups of {saved} elements, and this run's "
            f"have {present}; keep engine.zero_stage, or start a new run from its weights"
        )
