"""Saves and loads engines of which every process holds all weights: ZeRO-0, and the one without DeepSpeed.

All processes hold the same, so each writes its share of the weights, one after the other in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rlcm_fast import parallel
from rlcm_fast.engine.optimizers import load_state
from rlcm_fast.engine.shards import Part, Saved, Shard, check_same_weights, write_shard


def save_replica(folder: Path, network: nn.Module, optimizer: Optimizer, counters: Mapping[str, int]) -> None:
    """Writes this process's share of the trained weights, of their states and of the buffers."""
    parts = list(_parts(network, optimizer))
    write_shard(folder, Shard(parts[parallel.rank() :: parallel.world_size()], counters))


@torch.no_grad()
def load_replica(network: nn.Module, optimizer: Optimizer, saved: Saved) -> None:
    """Restores weights and states in place; raises ValueError if they are not those of this run."""
    trained, buffers = trained_weights(network), persistent_buffers(network)
    check_same_weights(saved.shapes, {name: tensor.shape for name, tensor in (trained | buffers).items()})
    if saved.has_groups:
        raise ValueError(
            "resume: the checkpoint's optimizer has 8-bit states of flat groups, which only engine.zero_stage 1 and 2 "
            "have; keep the stage that it was saved with, or start a new run from its weights"
        )
    for name, tensor in (trained | buffers).items():
        tensor.copy_(saved.whole("weight", name))
    for name, parameter in trained.items():
        states = {kind: saved.whole(kind, name) for kind in saved.kinds(name)}
        load_state(optimizer, parameter, states, saved.steps[name])


def trained_weights(network: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the weights that updates change, by name."""
    return {name: weight for name, weight in network.named_parameters() if weight.requires_grad}


def persistent_buffers(network: nn.Module) -> dict[str, Tensor]:
    """Returns what belongs to the network's state and is no weight, by name; diffusion UNets have none."""
    weights = dict(network.named_parameters())
    return {name: tensor for name, tensor in network.state_dict().items() if name not in weights}


def buffer_parts(network: nn.Module) -> list[Part]:
    """Returns the buffers as parts of a shard."""
    buffers = persistent_buffers(network)
    return [Part(name, tuple(tensor.shape), 0, tensor, {}, None, is_whole=True) for name, tensor in buffers.items()]


def _parts(network: nn.Module, optimizer: Optimizer) -> Iterator[Part]:
    for name, weight in trained_weights(network).items():
        state = dict(optimizer.state.get(weight, {}))
        step = int(state.pop("step")) if state else None
        yield Part(name, tuple(weight.shape), 0, weight.detach(), state, step, is_whole=True)
    yield from buffer_parts(network)
