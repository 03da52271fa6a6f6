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


class _Place(NamedTuple):
    """Where a module holds a tensor, the device that it works on, and its copy on the CPU."""

    table: Any  # a dictionary of parameters or of buffers
    name: str
    device: torch.device
    kept: Tensor

    def put(self, value: Tensor) -> None:
        is_parameter = isinstance(self.table[self.name], nn.Parameter)
        self.table[self.name] = nn.Parameter(value, requires_grad=False) if is_parameter else value


class FrozenNetwork:
    """A network whose weights never change; its copy in the CPU's memory stays."""

    def __init__(self, network: nn.Module, device: torch.device | None = None) -> None:
        """device: where it works; None means where each of its tensors is now."""
        self.network = network
        self._places = [
            _Place(table, name, device or tensor.device, _kept(tensor, device or tensor.device))
            for module in network.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        self._is_on_device = device is None
        self._num_users = 0

    def to_device(self) -> None:
        """Copies the weights to the device."""
        if not self._is_on_device:
            for place in self._places:
                place.put(place.kept.to(place.device, non_blocking=True))
        self._is_on_device = True

    def to_cpu(self) -> None:
        """Frees the weights on the device."""
        for place in self._places:
            place.put(place.kept)
        self._is_on_device = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """The network is on the device inside; blocks may nest, and the outermost one moves it."""
        if self._num_users == 0:
            self.to_device()
        self._num_users += 1
        try:
            yield
        finally:
            self._num_users -= 1
            if self._num_users == 0:
                self.to_cpu()


def _kept(tensor: Tensor, device: torch.device) -> Tensor:
    copy = tensor.detach().cpu()
    return copy.pin_memory() if device.type == "cuda" else copy
