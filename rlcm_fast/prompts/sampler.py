"""Which prompts each iteration draws: shuffled passes over the list, shared out over the processes.

All processes walk one and the same sequence, made from the seed: permutation after permutation of the list. An
iteration takes the next num_prompts * world_size of it and each rank its own slice, so the prompts of an iteration do
not depend on the number of processes, only on how many are drawn together.

Where an iteration runs over the end of a pass, the next permutation is rearranged (its first entries only) so that
the prompts of one iteration are still distinct; every pass holds every prompt once all the same.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Mapping, Sequence

import torch

from rlcm_fast.trajectory import Prompt


def deal(prompts: Sequence[Prompt], num_images: int, seed: int) -> list[Prompt]:
    """`num_images` prompts to measure with: each once in an order of the seed, then again from the start.

    Shuffled, as sources list their prompts in an order: the first 128 of `shapes:two:held_out` all begin with a circle.
    """
    shuffled = random.Random(seed).sample(list(prompts), len(prompts))
    return [shuffled[i % len(shuffled)] for i in range(num_images)]


class PromptSampler:
    """Draws the prompts of one rank, iteration by iteration, without end."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        num_prompts: int,
        images_per_prompt: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """num_prompts: distinct prompts an iteration on THIS rank; seed: the same on every rank."""
        for name, value in [("num_prompts", num_prompts), ("images_per_prompt", images_per_prompt)]:
            if value < 1:
                raise ValueError(f"prompts.{name}={value} must be at least 1")
        assert 0 <= rank < world_size, (rank, world_size)
        self._num_drawn_together = num_prompts * world_size
        if self._num_drawn_together > len(prompts):
            raise ValueError(
                f"prompts.num_prompts={self._num_drawn_together} distinct prompts an iteration exceed the"
                f" {len(prompts)} of prompts.source; lower it to at most {len(prompts)} (and raise"
                " prompts.images_per_prompt to keep the batch size), or give more prompts"
            )
        self._prompts = list(prompts)
        self._mine = slice(rank * num_prompts, (rank + 1) * num_prompts)
        self._images_per_prompt = images_per_prompt
        self._seed = seed
        self._restart()

    def next_batch(self) -> list[Prompt]:
        """The next num_prompts * images_per_prompt prompts of this rank; the repeats of a prompt lie side by side."""
        rows = self._draw()[self._mine]
        return [self._prompts[row] for row in rows for _ in range(self._images_per_prompt)]

    def state_dict(self) -> dict[str, int]:
        """Plain numbers, the same on every rank."""
        return {"num_batches": self._num_batches, "fingerprint": self._fingerprint()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on as the sampler that gave `state` would have; the number of processes may differ, the total may not."""
        if state["fingerprint"] != self._fingerprint():
            raise ValueError(
                f"prompts: the checkpoint was made with prompts other than these {len(self._prompts)}, a seed other"
                f" than {self._seed} or prompts.num_prompts other than {self._num_drawn_together}; resume with those"
                " of the checkpoint, or start a new run from its export"
            )
        # Replayed, as it costs microseconds an iteration and leaves two integers to store for any number of prompts.
        self._restart()
        for _ in range(state["num_batches"]):
            self._draw()

    def _restart(self) -> None:
        self._generator = torch.Generator().manual_seed(self._seed)
        self._order: list[int] = []
        self._position = 0
        self._num_batches = 0

    def _draw(self) -> list[int]:
        """The rows of the next iteration, of all ranks together."""
        rows = self._take(self._num_drawn_together)
        if len(rows) < self._num_drawn_together:
            self._start_pass(rows)
            rows = rows + self._take(self._num_drawn_together - len(rows))
        self._num_batches += 1
        return rows

    def _take(self, count: int) -> list[int]:
        """At most `count` rows from what is left of this pass."""
        rows = self._order[self._position : self._position + count]
        self._position += len(rows)
        return rows

    def _start_pass(self, already_drawn: list[int]) -> None:
        """A new permutation, whose first rows, which complete this iteration, are not among `already_drawn`."""
        shuffled = torch.randperm(len(self._prompts), generator=self._generator).tolist()
        drawn, num_missing = set(already_drawn), self._num_drawn_together - len(already_drawn)
        first: list[int] = []
        postponed: list[int] = []
        for position, row in enumerate(shuffled):
            if len(first) == num_missing:
                self._order = first + postponed + shuffled[position:]
                break
            (postponed if row in drawn else first).append(row)
        else:
            self._order = first + postponed
        self._position = 0

    def _fingerprint(self) -> int:
        words = [str(self._seed), str(self._num_drawn_together)]
        words += [word for prompt in self._prompts for word in (prompt.task, prompt.text)]
        return zlib.crc32("\0".join(words).encode())
