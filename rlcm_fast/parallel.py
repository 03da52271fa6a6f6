"""The processes of a run: which one is this, what do all of them hold, which random numbers does each one draw.

This is a thin layer over torch.distributed. It also works in a single process without a process group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlcm_fast.faults import Diverged, Fault

T = TypeVar("T")


def rank() -> int:
    """Returns the number of this process, in [0, world_size)."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Returns the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Tells whether this process writes the run folder and prints to the terminal."""
    return rank() == 0


def all_gather(values: Tensor) -> Tensor:
    """Concatenates the tensors (N, ...) of all ranks in rank order: (N * world_size, ...). Shapes must be equal."""
    if world_size() == 1:
        return values
    sent = _sendable(values).contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    dist.all_gather(parts, sent)
    return torch.cat(parts).to(values.device)


def mean(values: Tensor) -> Tensor:
    """Averages the tensors of all ranks; their shapes must be equal."""
    if world_size() == 1:
        return values
    total = _sendable(values).clone()
    dist.all_reduce(total)
    return total.to(values.device) / world_size()


def _sendable(values: Tensor) -> Tensor:
    """Moves the tensor to the GPU if NCCL sends it: NCCL refuses CPU tensors, such as rewards."""
    return values.cuda() if dist.get_backend() == "nccl" else values


def all_gather_list(values: list[T]) -> list[T]:
    """Joins the lists of all ranks in rank order; use it for small Python objects."""
    if world_size() == 1:
        return values
    parts: list[list[T]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, values)
    return [value for part in parts for value in part]


def rows_of_this_process(count: int) -> slice:
    """Returns the rows that this process contributed to a gathered tensor, if each process contributed `count`."""
    return slice(rank() * count, (rank() + 1) * count)


def any_rank(flag: bool) -> bool:
    """Tells whether the flag is set on any rank; every rank must call this."""
    if world_size() == 1:
        return flag
    return any(all_gather_list([flag]))


def leave() -> None:
    """Goes on without the other processes, which are lost or wait in vain: from here on this is rank 0 of 1."""
    dist.destroy_process_group()


def raise_together(fault: Fault | None) -> None:
    """Raises the first rank's fault on every rank, at one place, so that all can save together; every rank must call.

    A Diverged comes first, because then no rank may save. With several processes the message names the rank. The class
    of the fault must take its message alone.
    """
    # Find the ranks that have a fault.
    mine = [] if fault is None else [(type(fault), str(fault), rank())]
    found = all_gather_list(mine)
    if not found:
        return

    # Raise the worst of them; the rank that has it keeps the cause and the traceback.
    kind, message, where = min(found, key=lambda entry: not issubclass(entry[0], Diverged))
    if fault is not None and world_size() == 1:
        raise fault.of_all()
    raise kind(f"{message} (rank {where})").of_all() from fault


def together(work: Callable[[], T]) -> T:
    """Returns what `work` returns on this rank; a Fault of any rank ends it on all, once all are through with it.

    Every rank must call this, and no rank may wait for another after its fault.
    """
    returned: list[T] = []
    fault = None
    try:
        returned.append(work())
    except Fault as error:
        fault = error
    raise_together(fault)
    return returned[0]


def lost_process(error: BaseException) -> str | None:
    """Returns what gloo or NCCL said if another process of the run is gone; None if something else happened."""
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "ncclRemoteError")
    said = str(error) if isinstance(error, RuntimeError) else ""
    return next((text for text in texts if text in said), None)


def generator(seed: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Returns random numbers that depend on (seed, place...) alone, for example on (seed, rank, iteration).

    So no random state needs saving: a resumed run draws what an uninterrupted run would have drawn.
    """
    mixed = seed & 0xFFFFFFFF
    for number in place:  # splitmix64's finaliser: neighbouring places give unrelated streams
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 0x632BE59BD9B4E019) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return torch.Generator(device).manual_seed(mixed & 0x7FFFFFFFFFFFFFFF)


class Stream(IntEnum):
    """Names what random numbers are used for. Two streams of a run share no numbers."""

    ROLLOUT = 1
    UPDATE = 2
    RATIO_NOISE = 3
    TASK_GRADIENTS = 4
    REAL_IMAGES = 5
    IMAGE_SIZES = 6


@dataclass(frozen=True)
class Turn:
    """A place in the run: an iteration and one of its rounds. An iteration has several rounds if tasks take turns."""

    iteration: int
    round: int = 0
    num_rounds: int = 1
    seed: int = 0

    @property
    def following(self) -> Turn:
        """The turn after this one."""
        is_last = self.round + 1 == self.num_rounds
        return replace(self, iteration=self.iteration + is_last, round=0 if is_last else self.round + 1)

    @property
    def is_first(self) -> bool:
        """Tells whether this is the first turn of the run, before any update."""
        return self.iteration == self.round == 0

    def generator(self, stream: Stream) -> torch.Generator:
        """Returns the random numbers of this turn and process for one purpose."""
        return generator(self.seed, stream, rank(), self.iteration * self.num_rounds + self.round)

    def shared_generator(self, stream: Stream) -> torch.Generator:
        """Returns the random numbers of this turn for one purpose, the same on every process."""
        return generator(self.seed, stream, self.iteration * self.num_rounds + self.round)


def barrier() -> None:
    """Waits until every rank has called this."""
    if world_size() > 1:
        dist.barrier()
