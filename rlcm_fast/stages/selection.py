"""Which transitions an update trains on, in which order, and with which weight.

    mixed     all transitions shuffled over samples AND steps, cut into `num_updates` equal parts
    by_step   an update has num_timesteps / num_updates steps of all samples: one each in large-scale RL (2401.12244)
    together  an update has all actions of some groups of neighbouring samples, for algorithms that compare images

With num_timesteps above 0 that many of the K actions of a sample are drawn, once a rollout: in the order `by_step` the
same for all samples of all processes, whose gradients make one update, else each sample its own.
"""

# B samples, K actions, T <= K of them trained, U updates, N transitions of an update

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import UpdateConfig
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import Trajectory


@dataclass(frozen=True)
class UpdateRows:
    """The transitions of one update, as flat indices b K + k."""

    rows: Tensor  # (N,) int64; groups of samples that stay together lie side by side, each sample's actions in order
    order: Tensor  # (N,) int64, places in `rows` in the order in which micro-batches take them


class Selection:
    """The trained transitions of a rollout."""

    def __init__(
        self, trajectory: Trajectory, config: UpdateConfig, samples_together: int, generator: torch.Generator
    ) -> None:
        """samples_together: neighbouring samples that share an update with all their actions; 1: none need to."""
        self._config = config
        self._samples_together = samples_together
        self._generator = generator
        first = torch.arange(trajectory.num_samples)[:, None] * trajectory.num_actions
        self._by_sample = first + self._steps(trajectory)  # (B, T), of by_step in the order of updates

    def _steps(self, trajectory: Trajectory) -> Tensor:
        """(B, T) or (1, T) int64 in [0, K); in the order by_step every rank must ask."""
        num_actions = trajectory.num_actions
        num_trained = self._config.num_timesteps or num_actions
        if self._config.order == "by_step":
            steps = torch.randperm(num_actions, generator=self._generator)[:num_trained].tolist()
            return torch.tensor(parallel.all_gather_list([steps])[0])[None]  # the first process' for all
        if num_trained == num_actions:
            return torch.arange(num_actions)[None]
        scores = torch.rand(trajectory.num_samples, num_actions, generator=self._generator)
        return scores.argsort(dim=1)[:, :num_trained].sort(dim=1).values

    @property
    def rows(self) -> Tensor:
        """All of them, (B T,) ascending."""
        return self._by_sample.flatten().sort().values

    def one_pass(self) -> list[UpdateRows]:
        """U updates that train on each transition once, shuffled."""
        num_updates = self._config.num_updates
        if self._samples_together > 1:
            groups = self._by_sample.reshape(len(self._by_sample) // self._samples_together, -1)
            parts = groups[self._shuffled(len(groups))].reshape(num_updates, -1)
            return [UpdateRows(part, self._shuffled(len(part))) for part in parts]
        if self._config.order == "mixed":
            rows = self._by_sample.flatten()
            parts = rows[self._shuffled(len(rows))].reshape(num_updates, -1)
            return [UpdateRows(part, torch.arange(len(part))) for part in parts]
        parts = self._by_sample.T.reshape(num_updates, -1)
        return [UpdateRows(part, self._shuffled(len(part))) for part in parts]

    def _shuffled(self, count: int) -> Tensor:
        """(count,) a random order."""
        return torch.randperm(count, generator=self._generator)


def step_weights(schedule: Schedule, kind: str) -> Tensor:
    """(K,) float32 of mean 1, the weight of each action's loss; "sensitivity": proportional to sigma / |B|.

    The gradient of a log-prob in the network's output is B / sigma z over C H W, so with these every step pulls alike.
    """
    _, b, sigma = schedule.coefficients[: schedule.num_actions].T
    weights = (sigma / b).abs() if kind == "sensitivity" else torch.ones_like(sigma)
    return weights / weights.mean()
