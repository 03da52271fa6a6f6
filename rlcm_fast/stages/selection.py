"""Chooses the transitions that an update trains on, their order and their weights.

    mixed     shuffles all transitions over samples AND steps and cuts them into `num_updates` equal parts
    by_step   gives an update num_timesteps / num_updates steps of all samples: one step in large-scale RL (2401.12244)
    together  gives an update all actions of some groups of neighbouring samples, for algorithms that compare images

If num_timesteps is above 0, each rollout draws that many of the K actions of a sample. `by_step` draws the same actions
for all samples of all processes, because their gradients make one update; otherwise each sample draws its own actions.

With several image sizes, each update takes an equal share of every size: as many micro-batches on every process.
"""

# B samples, K actions, T <= K of them trained, U updates, N transitions of an update

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import UpdateConfig
from rlcm_fast.policies.schedules import Schedule
from rlcm_fast.trajectory import AnyTrajectory


@dataclass(frozen=True)
class UpdateRows:
    """The transitions of one update as flat indices b K + k."""

    rows: Tensor  # (N,) int64; groups of samples that stay together lie side by side, each sample's actions in order
    order: Tensor  # (N,) int64, places in `rows` in the order in which micro-batches take them


class Selection:
    """Chooses the transitions of a rollout to train on, and hands them out to updates."""

    def __init__(
        self, trajectory: AnyTrajectory, config: UpdateConfig, samples_together: int, generator: torch.Generator
    ) -> None:
        """samples_together: how many neighbouring samples share an update with all their actions; 1: none."""
        self._config = config
        self._samples_together = samples_together
        self._generator = generator
        first = torch.arange(trajectory.num_samples)[:, None] * trajectory.num_actions
        self._by_sample = first + self._steps(trajectory)  # (B, T); by_step: in the order of updates
        self._size_of = trajectory.size_of  # (B,)

    def _steps(self, trajectory: AnyTrajectory) -> Tensor:
        """Draws the actions to train on, (B, T) or (1, T) int64 in [0, K); with `by_step` every rank must call this."""
        num_actions = trajectory.num_actions
        num_trained = self._config.num_timesteps or num_actions
        if self._config.order == "by_step":
            steps = torch.randperm(num_actions, generator=self._generator)[:num_trained].tolist()
            return torch.tensor(parallel.all_gather_list([steps])[0])[None]  # the first process decides
        if num_trained == num_actions:
            return torch.arange(num_actions)[None]
        scores = torch.rand(trajectory.num_samples, num_actions, generator=self._generator)
        return scores.argsort(dim=1)[:, :num_trained].sort(dim=1).values

    @property
    def rows(self) -> Tensor:
        """All chosen transitions (B T,), ascending."""
        return self._by_sample.flatten().sort().values

    def one_pass(self) -> list[UpdateRows]:
        """Returns U updates that together train on each chosen transition once, in a new random order."""
        num_updates = self._config.num_updates
        if self._samples_together > 1:
            groups = self._by_sample.reshape(len(self._by_sample) // self._samples_together, -1)
            order = self._dealt(self._size_of[:: self._samples_together])
            parts = groups[order].reshape(num_updates, -1)
            return [UpdateRows(part, self._shuffled(len(part))) for part in parts]
        if self._config.order == "mixed":
            rows = self._by_sample.flatten()
            order = self._dealt(self._size_of.repeat_interleave(self._by_sample.shape[1]))
            parts = rows[order].reshape(num_updates, -1)
            return [UpdateRows(part, torch.arange(len(part))) for part in parts]
        parts = self._by_sample.T.reshape(num_updates, -1)
        return [UpdateRows(part, self._shuffled(len(part))) for part in parts]

    def _dealt(self, sizes: Tensor) -> Tensor:
        """Returns a random order of things of these image sizes (N,), in U equal parts that share each size equally."""
        order = self._shuffled(len(sizes))
        if sizes.min() == sizes.max():
            return order
        by_size = order[sizes[order].argsort(stable=True)]
        return by_size.reshape(-1, self._config.num_updates).T.flatten()

    def _shuffled(self, count: int) -> Tensor:
        """Returns a random order of `count` things, (count,) int64."""
        return torch.randperm(count, generator=self._generator)


def step_weights(schedule: Schedule, kind: str) -> Tensor:
    """Returns the weight of each action's loss, (K,) float32 of mean 1; "sensitivity" is proportional to sigma / |B|.

    The gradient of a log-prob in the network's output is B / sigma z over C H W, so these weights make the gradients of
    all steps equally large.
    """
    _, b, sigma = schedule.coefficients[: schedule.num_actions].T
    weights = (sigma / b).abs() if kind == "sensitivity" else torch.ones_like(sigma)
    return weights / weights.mean()
