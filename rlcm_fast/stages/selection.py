"""Which transitions an update trains on, in which order, and with which weight.

    mixed     all transitions shuffled over samples AND steps, cut into `num_updates` equal parts
    by_step   an update has num_timesteps / num_updates steps of all samples: one each in large-scale RL (2401.12244)
    pairs     an update has all actions of some pairs of neighbouring samples, for algorithms that compare two images

With num_timesteps above 0 that many of the K actions of a sample are drawn, once a rollout: in the order `by_step` the
same for all samples of all processes, whose gradients make one update, else each sample its own.
"""

# B samples, K actions, T <= K of them trained, U updates, N transitions of an update

from __future__ import annotations

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import UpdateConfig
from rlcm_fast.policies.schedules import Schedule


class Selection:
    """The trained transitions of a rollout, as flat indices b K + k."""

    def __init__(
        self, num_samples: int, num_actions: int, config: UpdateConfig, is_of_pairs: bool, generator: torch.Generator
    ) -> None:
        self._config = config
        self._is_of_pairs = is_of_pairs
        self._generator = generator
        first = torch.arange(num_samples)[:, None] * num_actions
        self._by_sample = first + self._steps(num_samples, num_actions)  # (B, T), of by_step in the order of updates

    def _steps(self, num_samples: int, num_actions: int) -> Tensor:
        """(B, T) or (1, T) int64 in [0, K); in the order by_step every rank must ask."""
        num_trained = self._config.num_timesteps or num_actions
        if self._config.order == "by_step":
            steps = torch.randperm(num_actions, generator=self._generator)[:num_trained].tolist()
            return torch.tensor(parallel.all_gather_list([steps])[0])[None]  # the first process' for all
        if num_trained == num_actions:
            return torch.arange(num_actions)[None]
        drawn = torch.rand(num_samples, num_actions, generator=self._generator).argsort(dim=1)[:, :num_trained]
        return drawn.sort(dim=1).values

    @property
    def rows(self) -> Tensor:
        """All of them, (B T,) ascending."""
        return self._by_sample.flatten().sort().values

    def one_pass(self) -> Tensor:
        """(U, N): each trained transition once, shuffled. Of pairs: in their order, for `shuffled` to be called on."""
        num_updates = self._config.num_updates
        if self._is_of_pairs:
            order = torch.randperm(len(self._by_sample) // 2, generator=self._generator)
            return self._by_sample.reshape(len(order), -1)[order].reshape(num_updates, -1)
        if self._config.order == "mixed":
            order = torch.randperm(self._by_sample.numel(), generator=self._generator)
            return self._by_sample.flatten()[order].reshape(num_updates, -1)
        parts = self._by_sample.T.reshape(num_updates, -1)
        return torch.stack([part[self.shuffled(len(part))] for part in parts])

    def shuffled(self, count: int) -> Tensor:
        """(count,) an order of so many transitions."""
        return torch.randperm(count, generator=self._generator)


def step_weights(schedule: Schedule, kind: str) -> Tensor:
    """(K,) float32 of mean 1, the weight of each action's loss; "sensitivity": proportional to sigma / |B|.

    The gradient of a log-prob in the network's output is B / sigma z over C H W, so with these every step pulls alike.
    """
    _, b, sigma = schedule.coefficients[: schedule.num_actions].T
    weights = (sigma / b).abs() if kind == "sensitivity" else torch.ones_like(sigma)
    return weights / weights.mean()
