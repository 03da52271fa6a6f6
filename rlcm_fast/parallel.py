"""The processes of a run: who am I, what do all of us have, which random numbers are mine.

A thin layer over torch.distributed that also works for a single process without a process group.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def rank() -> int:
    """This process's number in [0, world_size)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes the run folder and speaks to the terminal."""
    return rank() == 0


def all_gather(values: Tensor) -> Tensor:
    """The tensors of all ranks, equal shapes (N, ...), along the first dimension in rank order: (N * world, ...)."""
    if world_size() == 1:
        return values
    own = _sendable(values).contiguous()
    parts = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(parts, own)
    return torch.cat(parts).to(values.device)


def mean(values: Tensor) -> Tensor:
    """The mean of the tensors of all ranks, of equal shapes."""
    if world_size() == 1:
        return values
    total = _sendable(values).clone()
    dist.all_reduce(total)
    return total.to(values.device) / world_size()


def _sendable(values: Tensor) -> Tensor:
    """On the GPU where NCCL carries them, which refuses what is in the CPU's memory, as rewards are."""
    return values.cuda() if dist.get_backend() == "nccl" else values


def all_gather_list(values: list[T]) -> list[T]:
    """The lists of all ranks joined in rank order; for small Python objects."""
    if world_size() == 1:
        return values
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def rows_of_this_process(count: int) -> slice:
    """Which rows of a gathered tensor are this process's, where each process has `count` of them."""
    return slice(rank() * count, (rank() + 1) * count)


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; every rank must ask."""
    if world_size() == 1:
        return flag
    return any(all_gather_list([flag]))


def lost_process(error: BaseException) -> str | None:
    """What gloo or NCCL say where another process of the run is gone; None if that is not what happened."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
    said = str(error) if isinstance(error, RuntimeError) else ""
    return next((text for text in texts if text in said), None)


def generator(seed: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Random numbers that depend on (seed, place...) alone, for example (seed, rank, iteration).

    So nothing about randomness needs saving, and a resumed run draws what an uninterrupted one would have drawn.
    """
    mixed = seed & 0xFFFFFFFF
    for number in place:  # splitmix64's finaliser: neighbouring places give unrelated streams
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


class Stream(IntEnum):
    """What random numbers are for; two streams of a run share none."""

    ROLLOUT = 1
    UPDATE = 2
    RATIO_NOISE = 3
    TASK_GRADIENTS = 4
    REAL_IMAGES = 5


@dataclass(frozen=True)
class Turn:
    """Where in the run we are: an iteration, and which of its rounds (there are several where tasks take turns)."""

    iteration: int
    round: int = 0
    num_rounds: int = 1
    seed: int = 0

    @property
    def is_first(self) -> bool:
        """Whether nothing has been trained yet."""
        return self.iteration == self.round == 0

    def generator(self, stream: Stream) -> torch.Generator:
        """Random numbers of this turn and process for one purpose."""
        return generator(self.seed, stream, rank(), self.iteration * self.num_rounds + self.round)


def barrier() -> None:
    """Waits until every rank is here."""
    if world_size() > 1:
        dist.barrier()
