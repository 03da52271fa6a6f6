"""Draws a sampler's standard normal numbers, from a generator or from a seed for each sample and step.

DrawnNoise   a generator draws as in the pipelines of diffusers: the same seed gives their image
SeededNoise  the kernel of a step draws from seeds that lie on the device: noise does not depend on how samples are
             cut into micro-batches, and nothing is copied while sampling; rollouts use it
"""

# B samples, K actions, C H W latent

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rlcm_fast.kernels import functional


class Noise(Protocol):
    """The noise of B samples."""

    def first_states(self, scale: float, shape: Sequence[int]) -> Tensor:
        """Returns the states (B, C, H, W) float32 that sampling begins with: `scale` times the noise."""
        ...

    def act(self, action: int, x_t: Tensor, m: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the next states (B, C, H, W) and their log-probs (B,) of an action in [0, K)."""
        ...


@dataclass(frozen=True)
class DrawnNoise:
    """Numbers that a generator has drawn."""

    start: Tensor  # (B, C, H, W) float32
    actions: tuple[Tensor, ...]  # K of (B, C, H, W) float32

    @classmethod
    def draw(
        cls, shape: Sequence[int], num_actions: int, generator: torch.Generator, device: torch.device
    ) -> DrawnNoise:
        """Draws (B, C, H, W) = shape for the first states and then for each action, where the generator is."""

        def normal() -> Tensor:
            return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.float32).to(device)

        return cls(normal(), tuple(normal() for _ in range(num_actions)))

    def first_states(self, scale: float, shape: Sequence[int]) -> Tensor:
        return self.start * scale

    def act(self, action: int, x_t: Tensor, m: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        return functional.gaussian_step(x_t, m, coef, noise=self.actions[action])


@dataclass(frozen=True)
class SeededNoise:
    """Draws by Philox from seeds (B, K + 1) int64 on the device: of the first state, and of each action."""

    seeds: Tensor

    @classmethod
    def draw(cls, num_samples: int, num_actions: int, generator: torch.Generator, device: torch.device) -> SeededNoise:
        """Draws the seeds of B samples and copies them to the device, once for a rollout."""
        drawn = torch.randint(2**63 - 1, (num_samples, num_actions + 1), generator=generator)
        return cls(drawn.to(device))

    def take(self, rows: slice | Tensor) -> SeededNoise:
        """Returns the noise of the samples `rows`."""
        return SeededNoise(self.seeds[rows])

    def shared_by(self, index: Tensor) -> SeededNoise:
        """Gives samples of one prompt the same first state; index (B,) int64 is the row of their prompt, below B."""
        return SeededNoise(torch.cat([self.seeds[index, :1], self.seeds[:, 1:]], dim=1))

    def first_states(self, scale: float, shape: Sequence[int]) -> Tensor:
        zeros = torch.zeros(*shape, device=self.seeds.device)
        coef = zeros.new_zeros(len(zeros), 3)
        coef[:, 2] = scale
        return functional.gaussian_step(zeros, zeros, coef, seeds=self.seeds[:, 0])[0]

    def act(self, action: int, x_t: Tensor, m: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
        return functional.gaussian_step(x_t, m, coef, seeds=self.seeds[:, action + 1])
