"""Networks that never change, such as a VAE's decoder or a reward's model, and are on the device only while they work.

A copy of the weights stays in the CPU's memory, so moving there is one copy and coming back is none. For a GPU that
copy is pinned, and the move to it does not hold up the CPU. Nothing moves if the device is the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class _Tensor(NamedTuple):
    """A tensor of a network: the places that hold it, the device that it works on, and its copy on the CPU."""

    holders: list[tuple[Any, str]]  # tables of parameters or buffers, and its name there; several if modules share it
    is_parameter: bool
    device: torch.device
    kept: Tensor

    def put(self, value: Tensor) -> None:
        value = nn.Parameter(value, requires_grad=False) if self.is_parameter else value
        for table, name in self.holders:
            table[name] = value


class FrozenNetwork:
    """A network whose weights never change; its copy in the CPU's memory stays."""

    def __init__(self, network: nn.Module, device: torch.device | None = None) -> None:
        """device: where it works; None means where each of its tensors is now."""
        self.network = network
        self._tensors = [
            _Tensor(holders, isinstance(tensor, nn.Parameter), device or tensor.device, _kept(tensor, device))
            for tensor, holders in _holders(network)
        ]
        self._is_on_device = device is None

    def to_device(self) -> None:
        """Copies the weights to the device."""
        if not self._is_on_device:
            for tensor in self._tensors:
                tensor.put(tensor.kept.to(tensor.device, non_blocking=True))
        self._is_on_device = True

    def to_cpu(self) -> None:
        """Frees the weights on the device."""
        for tensor in self._tensors:
            tensor.put(tensor.kept)
        self._is_on_device = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The network is on the device inside."""
        self.to_device()
        try:
            yield
        finally:
            self.to_cpu()


def _holders(network: nn.Module) -> list[tuple[Tensor, list[tuple[Any, str]]]]:
    """Returns each tensor of the network with the tables that hold it, and its name in each."""
    found: dict[int, tuple[Tensor, list[tuple[Any, str]]]] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    found.setdefault(id(tensor), (tensor, []))[1].append((table, name))
    return list(found.values())


def _kept(tensor: Tensor, device: torch.device | None) -> Tensor:
    copy = tensor.detach().cpu()
    return copy.pin_memory() if (device or tensor.device).type == "cuda" else copy
