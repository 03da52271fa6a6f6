"""Tells what a run replays by CUDA graphs, as stages/graphing.py decides it, and what that keeps in memory.

    sampling, decoding, updates     which of them have a graph
    copies                          fixed inputs and outputs, beside the originals, for each image size
    pool                            activations: the largest of all graphs, which share one pool that is never freed
    gradients                       of graphed updates stay in place between updates, the rollout included

A graph is recorded after an ordinary run of the same work, so its first call needs its activations beside the pool that
was there before: with several image sizes, beside the graph of another size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcm_fast.planner.estimate import Strategy


@dataclass(frozen=True)
class Graphed:
    """Whether each kind of work is replayed."""

    sampling: bool = False
    decoding: bool = False
    updates: bool = False
    num_image_sizes: int = 1  # each has its own graphs

    @classmethod
    def of(cls, strategy: Strategy, num_image_sizes: int) -> Graphed:
        """Reads it off a strategy."""
        if strategy.graphs == "off":
            return cls()
        holds_gradients = strategy.dtype == "pure_bf16" and strategy.lora_rank == 0
        return cls(
            sampling=strategy.zero_stage < 3,
            decoding=not strategy.moves_idle,
            updates=holds_gradients and not strategy.optimizer_in_backward,
            num_image_sizes=num_image_sizes,
        )

    def copies(self, passes: Copied) -> int:
        """Bytes of fixed inputs and outputs, of one shape of each kind of work for each image size."""
        # Sampling: start, states, image and texts of a micro-batch; an update: the rows of one, gathered first.
        sampling = passes.sampled * ((passes.num_actions + 3) * passes.latent_bytes + passes.text_bytes)
        decoding = passes.decoded * passes.latent_bytes
        states = 3 if passes.has_start_model else 2
        updates = 2 * passes.updated * (states * passes.latent_bytes + passes.text_bytes)
        of_a_size = self.sampling * sampling + self.decoding * decoding + self.updates * updates
        return of_a_size * self.num_image_sizes


@dataclass(frozen=True)
class Copied:
    """The sizes of what graphs read and write."""

    sampled: int  # in a micro-batch of a rollout
    decoded: int  # at once
    updated: int  # transitions in a micro-batch of an update
    num_actions: int
    latent_bytes: int  # one float32 latent
    text_bytes: int  # one text's encoding
    has_start_model: bool  # whose outputs an update reads
