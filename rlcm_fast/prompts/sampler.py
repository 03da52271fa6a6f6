"""Which prompts each iteration draws: shuffled passes over the list, shared out over the processes.

All processes walk one and the same sequence, made from the seed: permutation after permutation of the list. An
iteration takes the next num_prompts * world_size of it and each rank its own slice, so the prompts of an iteration do
not depend on the number of processes, only on how many are drawn together.

Where an iteration runs over the end of a pass, the next permutation is rearranged (its first entries only) so that
the prompts of one iteration are still distinct; every pass holds every prompt once all the same.

A permutation is a tensor, 4 bytes a prompt.
"""

from __future__ import annotations

import functools
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlcm_fast.prompts.files import PromptFile
from rlcm_fast.trajectory import Prompt

# D prompts drawn together: an iteration's, of all ranks; N prompts of the source


@dataclass(frozen=True)
class Share:
    """What one process draws in an iteration: its part of the D prompts that all of them draw together.

    num_prompts     distinct prompts on this rank
    seed            of the order; the same on every rank
    task            what every prompt is labelled with, one of several tasks; "" leaves the label that it has

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
    def num_drawn_together(self) -> int:
        """D."""
        return self.num_prompts * self.world_size

    @property
    def mine(self) -> slice:
        """Of D rows, those of this rank."""
        return slice(self.rank * self.num_prompts, (self.rank + 1) * self.num_prompts)

    def repeated(self, prompts: Iterable[Prompt]) -> list[Prompt]:
        """One prompt for each image, labelled; the repeats of a prompt lie side by side."""
        labelled = (replace(prompt, task=self.task) for prompt in prompts) if self.task else prompts
        return [prompt for prompt in labelled for _ in range(self.images_per_prompt)]

    def exceeds(self, where: str, count: int) -> str:
        """What is wrong with a source (`where` it is set, and its value) of `count` prompts, and the way out."""
        if self.task:
            return (
                f"{where} holds {count} prompts, fewer than the {self.num_drawn_together} of task {self.task} in an"
                " iteration; raise its images_per_prompt (it keeps its share of the images), lower its share or"
                " prompts.num_prompts, or give more prompts"
            )
        return (
            f"{where} holds {count} prompts, fewer than the prompts.num_prompts={self.num_drawn_together} of an"
            f" iteration; lower it to at most {count} (and raise prompts.images_per_prompt to keep the batch size), or"
            " give more prompts"
        )


class Sampler(Protocol):
    """Draws the prompts of one rank, iteration by iteration, without end."""

    def next_batch(self) -> list[Prompt]:
        """The next num_prompts * images_per_prompt prompts of this rank; the repeats of a prompt lie side by side."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the same on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the sampler that gave `state` would have; the number of processes may differ, the total may not."""
        ...


def deal(prompts: Sequence[Prompt], num_images: int, seed: int) -> list[Prompt]:
    """`num_images` prompts to measure with: each once in an order of the seed, then again from the start.

    Shuffled, as sources list their prompts in an order: the first 128 of `shapes:two:held_out` all begin with a circle.
    """
    rows = _shuffled_rows(len(prompts), min(num_images, len(prompts)), seed)
    shuffled = [prompts[row] for row in rows]
    return [shuffled[i % len(shuffled)] for i in range(num_images)]


def _shuffled_rows(total: int, count: int, seed: int) -> list[int]:
    """The first `count` of random.Random(seed).sample(range(total), total), which would list all of them.

    That is a pool from whose rows one is picked at random and the last one put into its place.
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
    _order: Tensor  # (N,) int32, the rows of this pass; none before the first
    _position: int  # in _order
    _num_batches: int  # drawn so far

    def __init__(self, prompts: Sequence[Prompt], share: Share, where: str = "prompts.source") -> None:
        """where: what errors begin with, as prompts.source=FILE; ValueError where an iteration takes more than all."""
        if share.num_drawn_together > len(prompts):
            raise ValueError(share.exceeds(where, len(prompts)))
        self._prompts, self._where = prompts, where
        self._share = share
        self._restart()

    def next_batch(self) -> list[Prompt]:
        rows = self._draw()[self._share.mine].tolist()
        return self._share.repeated(self._prompts[row] for row in rows)

    def state_dict(self) -> dict[str, int]:
        return {"num_batches": self._num_batches, "fingerprint": self._fingerprint}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"{self._where}: the checkpoint was made with prompts other than these {len(self._prompts)}, a seed"
                f" other than {self._share.seed} or other than {self._share.num_drawn_together} prompts an iteration;"
                " resume with those of the checkpoint, or start a new run from its export"
            )
        # Replayed, a permutation a pass: whole iterations within a pass are skipped, and two integers are all to store.
        self._restart()
        while self._num_batches < state["num_batches"]:
            left_in_pass = (len(self._order) - self._position) // self._share.num_drawn_together
            num_skipped = min(left_in_pass, state["num_batches"] - self._num_batches)
            self._position += num_skipped * self._share.num_drawn_together
            self._num_batches += num_skipped
            if self._num_batches < state["num_batches"]:
                self._draw()

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._share.seed)
        self._order = torch.empty(0, dtype=torch.int32)
        self._position = 0
        self._num_batches = 0

    def _draw(self) -> Tensor:
        """The rows of the next iteration, of all ranks together: (D,) int32."""
        rows = self._take(self._share.num_drawn_together)
        if len(rows) < self._share.num_drawn_together:
            self._start_pass(rows)
            rows = torch.cat([rows, self._take(self._share.num_drawn_together - len(rows))])
        self._num_batches += 1
        return rows

    def _take(self, count: int) -> Tensor:
        """At most `count` rows from what is left of this pass."""
        rows = self._order[self._position : self._position + count]
        self._position += len(rows)
        return rows

    def _start_pass(self, already_drawn: Tensor) -> None:
        """A new permutation, whose first rows, which complete this iteration, are not among `already_drawn`."""
        order = torch.randperm(len(self._prompts), generator=self._generator, dtype=torch.int32)
        if len(already_drawn):
            drawn, rows = set(already_drawn.tolist()), order[: self._share.num_drawn_together].tolist()
            first = [row for row in rows if row not in drawn][: self._share.num_drawn_together - len(drawn)]
            moved = set(first)
            order[: len(rows)] = torch.tensor(first + [row for row in rows if row not in moved])
        self._order, self._position = order, 0

    @functools.cached_property
    def _fingerprint(self) -> int:
        """Of all prompts, the seed and D."""
        crc = zlib.crc32(f"{self._share.seed}\0{self._share.num_drawn_together}".encode())
        if isinstance(self._prompts, PromptFile):
            return zlib.crc32(f"\0{self._prompts.crc}".encode(), crc)
        for prompt in self._prompts:
            crc = zlib.crc32(f"\0{prompt.task}\0{prompt.text}".encode(), crc)
        return crc
