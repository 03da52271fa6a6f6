"""Draws which image size each prompt of a rollout has, if a run has several (model.image_sizes).

    (seed, turn) -> an order of the sizes -> blocks of prompts, in this order -> runs of samples of one size

All images of a prompt have one size. The order is the same on every process, so all run as many passes of the network,
of the same shapes: ZeRO-3 needs the first, and the second keeps processes from waiting for each other.
"""

# B samples of this process, S sizes

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlcm_fast.config.image_sizes import prompts_of_blocks
from rlcm_fast.config.resolved import ResolvedRun, Task
from rlcm_fast.parallel import Stream, Turn
from rlcm_fast.trajectory import MixedTrajectory, Trajectory

Size = tuple[int, int]  # height and width in pixels


@dataclass(frozen=True)
class Run:
    """Neighbouring samples of one size."""

    rows: Tensor  # (N,) int64 in [0, B)
    size: Size | None  # None: the model's


@dataclass(frozen=True)
class ImageSizes:
    """The sizes of a run's images; none if the model has one size."""

    sizes: Sequence[Size] = ()
    rounds: Sequence[Sequence[Task]] = field(default=())  # the tasks of each round
    num_processes: int = 1

    @classmethod
    def of(cls, run: ResolvedRun) -> ImageSizes:
        return cls(run.config.model.sizes, run.rounds, run.sizes.num_processes)

    def runs(self, num_samples: int, turn: Turn) -> list[Run]:
        """Divides the B samples of a rollout into runs of one size, in the order of the samples."""
        if len(self.sizes) < 2:
            return [Run(torch.arange(num_samples), None)]

        # Each task divides its prompts among the sizes, which all tasks take in the same order.
        order = torch.randperm(len(self.sizes), generator=turn.shared_generator(Stream.IMAGE_SIZES)).tolist()
        found, first = [], 0
        for task in self.rounds[turn.round]:
            blocks = prompts_of_blocks(round(task.num_prompts) // self.num_processes, len(self.sizes))
            for index, num_prompts in zip(order, blocks, strict=False):
                rows = torch.arange(first, first + num_prompts * task.images_per_prompt)
                found.append(Run(rows, self.sizes[index]))
                first += len(rows)
        assert first == num_samples, f"{num_samples} samples, but prompts for {first}"
        return found


def joined(runs: Sequence[Run], trajectories: Sequence[Sequence[Trajectory]]) -> Trajectory | MixedTrajectory:
    """Joins the trajectories of all runs, each in pieces; samples of one size come together."""
    # Collect what has the same size.
    pieces: dict[Size | None, list[Trajectory]] = {}
    rows: dict[Size | None, list[Tensor]] = {}
    for run, of_run in zip(runs, trajectories, strict=True):
        pieces.setdefault(run.size, []).extend(of_run)
        rows.setdefault(run.size, []).append(run.rows)

    # One size needs no mixture.
    parts = [Trajectory.cat(of_size) for of_size in pieces.values()]
    return parts[0] if len(parts) == 1 else MixedTrajectory(parts, [torch.cat(own) for own in rows.values()])
