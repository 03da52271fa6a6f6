"""The interface of an engine, which owns the trained weights, their gradients and the optimizer.

    begin_update(n) -> n times: engine(x, ...) -> loss -> backward(loss) -> step()      [full_weights, save, load]

An update whose gradient is not finite moves nothing: no weight, no moment, no random number of the rounding. It counts
as an update for the learning rate's schedule, which depends only on how many updates the run has had. All processes
agree on it, because it is decided by the gradient that they average. The number that decides it is the norm, which
every engine reads once per update before it steps, so this costs no other wait for the device.

A loss that is not finite makes its whole gradient so (`gradient_fails_with`): a clip, a mask or a maximum on the way to
the weights could otherwise turn the NaN of a loss into a gradient of zeros.

Everything else (VAE, text encoder, rewards, the frozen start model) is plain torch and never partitioned.
zero.py uses DeepSpeed, which partitions the weights and keeps float32 master weights. direct.py does without it, for
bfloat16 weights without a master copy and for an optimizer that steps within the backward pass. build.py chooses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlcm_fast import parallel


@dataclass(frozen=True)
class UpdatePlan:
    """The updates that an engine is built for."""

    num_micro_batches: int  # in one update on each process, at most
    num_updates: int  # in the whole run, for the learning rate's schedule
    max_grad_norm: float  # 0 turns clipping off
    micro_batch_size: int = 1  # transitions; DeepSpeed requires a number, and nothing depends on it


class Engine(ABC):
    """The trained network; call it like the network."""

    zero_stage: int
    skips_whole_updates: bool = True  # False: weights step before the whole gradient exists, see direct.py

    @abstractmethod
    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Returns the network's output."""

    @abstractmethod
    def begin_update(self, num_micro_batches: int) -> None:
        """Sets the backward passes per update on each process from now on: at most as many as the plan says."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (), which is one micro-batch's contribution to the loss of the update."""

    @abstractmethod
    def step(self) -> float | None:
        """Ends a micro-batch. The last one of an update steps the optimizer and returns the norm before clipping.

        A norm that is not finite says that the update was skipped; it is so on every process.
        """

    @property
    def graph_problem(self) -> str:
        """Why backward passes cannot be replayed as a graph; empty if they can, by the three methods below."""
        return "its engine does not keep gradients in one place"

    def hold_gradients(self) -> Mapping[Tensor, Tensor]:
        """Keeps each gradient at one address from now on, zero between updates; returns them by their weights."""
        raise NotImplementedError

    def differentiate(self, loss: Tensor) -> None:
        """Does the device's part of `backward`, which a graph records."""
        raise NotImplementedError

    def note_backward(self) -> None:
        """Does the host's part of `backward`, after each replay."""
        raise NotImplementedError

    def may_begin_again(self, num_micro_batches: int) -> bool:
        """Tells whether an update may drop its gradients and add up anew, in so many backward passes."""
        return False

    def drop_gradients(self) -> None:
        """Drops what an update has added up before its step."""
        raise NotImplementedError

    @property
    @abstractmethod
    def lr(self) -> float:
        """The learning rate of the next update."""

    def metrics(self) -> dict[str, float]:
        """Returns what the engine measured since the last call."""
        return {}

    @abstractmethod
    def weights_are_finite(self) -> bool:
        """Tells whether all trained weights are finite, on every process; every process must call this.

        It reads the weights once where they are, takes no memory, and waits for the device once.
        """

    @abstractmethod
    def full_weights(self) -> dict[str, Tensor]:
        """Returns all weights in float32 on the CPU, the same on every rank; under ZeRO-3 all must call."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Writes the trained weights and the optimizer's state, but no frozen weights; every rank must call.

        All of it is on the disk when the call returns. Ranks do not wait for each other.
        """

    @abstractmethod
    def load(self, folder: Path, trusts_old: bool = False) -> None:
        """Restores what `save` wrote, on any number of processes; every rank must call.

        trusts_old: also read pickles, which run code, if a version without shards wrote the folder.

        Raises:
            ValueError: the folder holds no such checkpoint, it was saved for other weights or by another kind of
                optimizer, or its states cannot be partitioned for this number of processes.
        """


def gradient_fails_with(loss: Tensor) -> Tensor:
    """Returns the loss (); its gradient is NaN everywhere if the loss is not finite, and else bitwise the same."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Tells whether all elements are finite on every process; the largest absolute value shows NaN and infinity."""
    whole = [tensor.detach() for tensor in tensors if tensor.numel() > 0]
    largest = torch.stack([norm.float() for norm in torch._foreach_norm(whole, torch.inf)]) if whole else torch.zeros(1)
    return not parallel.any_rank(not bool(largest.isfinite().all()))


def copied_to_cpu(network: nn.Module) -> dict[str, Tensor]:
    """Copies the network's weights to the CPU, by name, in float32 and contiguous, as files hold them."""
    contiguous = torch.contiguous_format
    weights = network.state_dict().items()
    return {name: weight.detach().float().cpu().clone(memory_format=contiguous) for name, weight in weights}
