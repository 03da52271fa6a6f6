"""Draws the prompts of each iteration: shuffled passes over the list, split over the processes.

All processes walk the same sequence, which the seed fixes: one permutation of the list after another. An iteration
takes the next num_prompts * world_size prompts, and each rank takes its slice of them. So the prompts of an iteration
depend on how many prompts all ranks draw together, but not on the number of processes.

An iteration may cross the end of a pass. The sampler then rearranges the first entries of the next permutation, to keep
the prompts of the iteration distinct. Every pass still holds every prompt once.

A permutation is a tensor of 4 bytes per prompt.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlcm_fast.prompts.files import PromptFile
from rlcm_fast.trajectory import Prompt

# D prompts of an iteration on all ranks, N prompts of the source


@dataclass(frozen=True)
class Share:
    """The part that one process draws of the D prompts of an iteration.

    num_prompts     distinct prompts on this rank
    seed            fixes the order; the same on every rank
    task            the label of every prompt, if the run has several tasks; "" keeps the label from the source

    Raises ValueError for counts less than one.
    """

    num_prompts: int
    images_per_prompt: int
    seed: int
    rank: int = 0
    world_size: int = 1
    task: str = ""

    def __post_init__(self) -> None:
        for name in ("num_prompts", "images_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"prompts.{name}={getattr(self, name)} must be at least 1")
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)

    @property
    def num_per_iteration(self) -> int:
        """D, the number of prompts of an iteration on all ranks."""
        return self.num_prompts * self.world_size

    @property
    def rank_rows(self) -> slice:
        """The slice of D rows that belongs to this rank."""
        return slice(self.rank * self.num_prompts, (self.rank + 1) * self.num_prompts)

    def repeated(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """One labelled prompt per image; the repeats of a prompt lie side by side."""
        labelled = (replace(prompt, task=self.task) for prompt in prompts) if self.task else prompts
        return [prompt for prompt in labelled for _ in range(self.images_per_prompt)]

    def exceeds(self, where: str, count: int) -> str:
        """The error text for a source with only `count` prompts; `where` is its field and value."""
        if self.task:
            return (
                f"{where} holds {count} prompts, fewer than the {self.num_per_iteration} of task {self.task} in an"
                " iteration; raise its images_per_prompt (it keeps its share of the images), lower its share or"
                " prompts.num_prompts, or give more prompts"
            )
        return (
            f"{where} holds {count} prompts, fewer than the prompts.num_prompts={self.num_per_iteration} of an"
            f" iteration; lower it to at most {count} (and raise prompts.images_per_prompt to keep the batch size), or"
            " give more prompts"
        )


class Sampler(Protocol):
    """Draws the prompts of one rank, iteration by iteration, without end."""

    def next_batch(self) -> list[Prompt]:
        """The next num_prompts * images_per_prompt prompts of this rank; the repeats of a prompt lie side by side."""
        ...

    def known(self, most: int) -> Sequence[Prompt]:
        """Prompts that are at hand, at most `most`; of a dataset those of the window that is read."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state as plain values for JSON, the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the sampler that returned `state` would; the number of processes may differ, but D may not."""
        ...


class DrawnPrompts:
    """Asks a function for every prompt, which may come twice in an iteration."""

    def __init__(self, draw: Callable[[], Prompt], share: Share) -> None:
        self._draw, self._share = draw, share
        self._num_batches = 0

    def next_batch(self) -> list[Prompt]:
        self._num_batches += 1
        return self._share.repeated(self._draw() for _ in range(self._share.num_prompts))

    def known(self, most: int) -> Sequence[Prompt]:
        """None is at hand: a call would change what the run draws."""
        return []

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of iterations; where the function goes on is its own affair."""
        return {"num_batches": self._num_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._num_batches = state["num_batches"]


def prompts_for_images(prompts: Sequence[Prompt], num_images: int, seed: int) -> list[Prompt]:
    """The prompts of `num_images` images of a measurement, shuffled by `seed`; they repeat if there are too few.

    The shuffle is needed because sources list their prompts in an order: the first 128 of `shapes:two:held_out` all
    begin with a circle.
    """
    rows = _shuffled_rows(len(prompts), min(num_images, len(prompts)), seed)
    shuffled = [prompts[row] for row in rows]
    return [shuffled[i % len(shuffled)] for i in range(num_images)]


def _shuffled_rows(total: int, count: int, seed: int) -> list[int]:
    """The first `count` rows of random.Random(seed).sample(range(total), total), without a list of all `total` rows.

    Like `sample`, it picks a random row from a pool and then moves the last row of the pool into the gap.
    """
    generator = random.Random(seed)
    moved: dict[int, int] = {}
    rows = []
    for last in range(total - 1, total - 1 - count, -1):
        place = generator.randrange(last + 1)
        rows.append(moved.get(place, place))
        moved[place] = moved.get(last, last)
    return rows


class PromptSampler:
    """Draws from a list or a file of prompts."""

    _generator: torch.Generator
    _order: Tensor  # (N,) int32, the rows of this pass; empty before the first pass
    _position: int  # the next index in _order
    _num_batches: int  # the number of iterations so far

    def __init__(self, prompts: Sequence[Prompt], share: Share, where: str = "prompts.source") -> None:
        """Begin at the first pass; errors begin with `where`, such as prompts.source=FILE.

        Raises ValueError if an iteration needs more prompts than there are.
        """
        if share.num_per_iteration > len(prompts):
            raise ValueError(share.exceeds(where, len(prompts)))
        self._prompts, self._where = prompts, where
        self._share = share
        self._restart()

    def next_batch(self) -> list[Prompt]:
        rows = self._draw()[self._share.rank_rows].tolist()
        return self._share.repeated(self._prompts[row] for row in rows)

    def known(self, most: int) -> Sequence[Prompt]:
        return self._prompts[:most]

    def state_dict(self) -> dict[str, int]:
        return {"num_batches": self._num_batches, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{self._where}: the checkpoint was made with prompts other than these {len(self._prompts)}, a seed"
                f" other than {self._share.seed} or other than {self._share.num_per_iteration} prompts per iteration;"
                " resume with those of the checkpoint, or start a new run with --resume_weights_only PATH"
            )
        # Replay the passes, one permutation each, so that a state needs only two integers.
        self._restart()
        while self._num_batches < state["num_batches"]:
            # Skip the iterations that lie within this pass, then draw the one that crosses its end.
            left_in_pass = (len(self._order) - self._position) // self._share.num_per_iteration
            num_skipped = min(left_in_pass, state["num_batches"] - self._num_batches)
            self._position += num_skipped * self._share.num_per_iteration
            self._num_batches += num_skipped
            if self._num_batches < state["num_batches"]:
                self._draw()

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._share.seed)
        self._order = torch.empty(0, dtype=torch.int32)
        self._position = 0
        self._num_batches = 0

    def _draw(self) -> Tensor:
        """The rows of the next iteration on all ranks: (D,) int32."""
        rows = self._take(self._share.num_per_iteration)
        if len(rows) < self._share.num_per_iteration:
            self._start_pass(rows)
            rows = torch.cat([rows, self._take(self._share.num_per_iteration - len(rows))])
        self._num_batches += 1
        return rows

    def _take(self, count: int) -> Tensor:
        """The next `count` rows of this pass, or fewer at its end."""
        rows = self._order[self._position : self._position + count]
        self._position += len(rows)
        return rows

    def _start_pass(self, rows_before: Tensor) -> None:
        """Make a new permutation; its first rows complete the iteration that began with `rows_before`."""
        order = torch.randperm(len(self._prompts), generator=self._generator, dtype=torch.int32)
        if len(rows_before):
            # Move rows to the front that the iteration does not hold yet, so that its prompts are distinct.
            before, rows = set(rows_before.tolist()), order[: self._share.num_per_iteration].tolist()
            first = [row for row in rows if row not in before][: self._share.num_per_iteration - len(before)]
            moved = set(first)
            order[: len(rows)] = torch.tensor(first + [row for row in rows if row not in moved])
        self._order, self._position = order, 0

    @functools.cached_property
    def _fingerprint(self) -> int:
        """A checksum of all prompts, the seed and D."""
        crc = zlib.crc32(f"{self._share.seed}\0{self._share.num_per_iteration}".encode())
        if isinstance(self._prompts, PromptFile):
            return zlib.crc32(f"\0{self._prompts.crc}".encode(), crc)
        for prompt in self._prompts:
            metadata = f"\0{prompt.metadata}" if prompt.metadata else ""  # as before, for checkpoints from before
            crc = zlib.crc32(f"\0{prompt.task}\0{prompt.text}{metadata}".encode(), crc)
        return crc
