"""Combines several rewards into one advantage for each image: rewards_combine of a run or of a task.

    sum             A = advantages(sum_k w_k r_k)
                    a reward whose scores spread more, in its own unit, decides
    normalised      A = c sum_k w_k A_k,      A_k = advantages(r_k),      c = 1 / std over the batch
                    GDPO (arXiv 2601.05242, equations 4 to 6): each reward is standardised by its own statistics first
    lexicographic   the same, but reward k counts for an image only where all rewards before it are met:
                    A_k = advantages of r_k among the images with r_j >= threshold_j for all j < k, 0 for the others
                    and r_j counts up to its threshold: A_j = advantages(min(r_j, threshold_j))

`advantages` is the kind that the run or the task has (advantages.py). lexicographic is GDPO's conditioned reward
(section 3.2) with the statistics of the images that it counts for. A reward of negative weight, which should be low, is
met at or below its threshold. A higher total of an image that meets the threshold over one that does not is not forced:
an image that meets it and is the worst of all in the second reward may come out lower.

Each A_k keeps statistics of its own, so a checkpoint holds a state for each reward. An image without one of its scores
(NaN) has no advantage, and is left out of all statistics.

Departure from the paper: no mean of the batch is subtracted before c, because each A_k is centred by its kind. So an
image without a signal keeps exactly 0, and the update need not run the network on it.
"""

# B samples of a task, A of all tasks, M rewards of a task

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rlcm_fast.algorithms.advantages import Advantages, build_advantages
from rlcm_fast.config import AdvantagesConfig
from rlcm_fast.trajectory import Prompt

_EPSILON = 1e-6


@dataclass(frozen=True)
class Scores:
    """The scores of images, NaN where one is missing."""

    total: Tensor  # (A,) float32, sum of weight * score
    by_reward: Tensor  # (A, M) float32, in the order of the task's rewards; columns that its task has not are 0

    def __getitem__(self, places: list[int]) -> Scores:
        return Scores(self.total[places], self.by_reward[places])


class Combined(Protocol):
    """Turns the scores of a task's images into advantages."""

    def __call__(self, scores: Tensor | Scores, prompts: Sequence[Prompt]) -> Tensor:
        """Returns (B,) float32; a Tensor (B,) is the total of a task with one reward."""
        ...

    def parts(self) -> Mapping[str, Tensor]:
        """Returns what each reward adds to the last advantages (B,), by label; nothing for a single reward."""
        ...

    def metrics(self) -> Mapping[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class Weighted:
    """What a task says of one of its rewards."""

    label: str
    weight: float
    threshold: float | None = None  # lexicographic: where it is met


class Summed:
    """Standardises the weighted sum."""

    def __init__(self, advantages: Advantages, rewards: Sequence[Weighted]) -> None:
        self._advantages, self._rewards = advantages, rewards
        self._parts: dict[str, Tensor] = {}
        self._total = torch.zeros(0)

    def __call__(self, scores: Tensor | Scores, prompts: Sequence[Prompt]) -> Tensor:
        total = scores if isinstance(scores, Tensor) else scores.total
        advantages = self._advantages(total, prompts)
        if isinstance(scores, Scores) and len(self._rewards) > 1:
            self._total, self._parts = advantages, self._shown(scores, prompts)
        return advantages

    def _shown(self, scores: Scores, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Returns weight * (score - mean) / std of the total, by the prompt's images in this batch; NaN without it.

        The kind of the advantages may have other means, of earlier batches; this is what the rewards add in this one.
        """
        total = _centred(scores.total, prompts)
        std = _root_mean_square(total)
        columns = scores.by_reward.unbind(dim=1)[: len(self._rewards)]
        found = {}
        for reward, column in zip(self._rewards, columns, strict=True):
            known = column.masked_fill(scores.total.isnan(), math.nan)
            found[reward.label] = reward.weight * _centred(known, prompts) / (std + _EPSILON)
        return found

    def parts(self) -> Mapping[str, Tensor]:
        return self._parts

    def metrics(self) -> Mapping[str, float]:
        return {**self._advantages.metrics(), **part_metrics(self._parts, self._total)}

    def state_dict(self) -> dict[str, Any]:
        return self._advantages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._advantages.load_state_dict(state)


class Normalised:
    """Standardises each reward by itself, then sums; with thresholds, a reward counts where those before it are met."""

    def __init__(self, advantages: Mapping[str, Advantages], rewards: Sequence[Weighted], conditioned: bool) -> None:
        """advantages: one object for each reward, by label; conditioned: lexicographic."""
        self._advantages, self._rewards, self._conditioned = dict(advantages), rewards, conditioned
        self._parts: dict[str, Tensor] = {}
        self._total = torch.zeros(0)
        self._met: dict[str, float] = {}

    def __call__(self, scores: Tensor | Scores, prompts: Sequence[Prompt]) -> Tensor:
        # Take the images that have all their scores.
        columns = [scores] if isinstance(scores, Tensor) else list(scores.by_reward.unbind(dim=1))
        columns = columns[: len(self._rewards)]
        is_there = ~torch.stack(columns).isnan().any(dim=0)
        counts = is_there.clone()

        # Standardise each reward among the images that it counts for.
        parts: dict[str, Tensor] = {}
        for reward, column in zip(self._rewards, columns, strict=True):
            sign = math.copysign(1.0, reward.weight)
            values, threshold = sign * column, math.inf
            if self._conditioned and reward.threshold is not None:
                threshold = sign * reward.threshold
            known = values.clamp(max=threshold).masked_fill(~counts, math.nan)
            found = self._advantages[reward.label](known, prompts) if counts.any() else torch.zeros_like(known)
            parts[reward.label] = abs(reward.weight) * found.nan_to_num(nan=0.0)
            if threshold < math.inf:
                counts &= values >= threshold
                self._met[reward.label] = (counts.sum() / is_there.sum().clamp(min=1)).item()

        # Sum them up, to a standard deviation of 1; nothing is subtracted, so that 0 stays 0.
        total = torch.stack(list(parts.values())).sum(dim=0)
        scale = 1 / (_root_mean_square(total[is_there]) + _EPSILON)
        self._parts = {label: part * scale for label, part in parts.items()} if len(parts) > 1 else {}
        self._total = (total * scale).masked_fill(~is_there, math.nan)
        return self._total

    def parts(self) -> Mapping[str, Tensor]:
        return self._parts

    def metrics(self) -> Mapping[str, float]:
        found = {f"{label}/met": share for label, share in self._met.items()}
        for label, advantages in self._advantages.items():
            prefix = f"{label}/" if len(self._advantages) > 1 else ""
            found |= {f"{prefix}{key}": value for key, value in advantages.metrics().items()}
        return {**found, **part_metrics(self._parts, self._total)}

    def state_dict(self) -> dict[str, Any]:
        return {"by_reward": {label: advantages.state_dict() for label, advantages in self._advantages.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores each reward's statistics; those without a state begin anew."""
        saved = state.get("by_reward", {})
        for label, advantages in self._advantages.items():
            advantages.load_state_dict(saved.get(label, {}))


class TaskAdvantages:
    """Standardises the images of each task with the statistics of that task."""

    def __init__(self, by_task: Mapping[str, Combined | Advantages]) -> None:
        self._by_task = dict(by_task)
        self._places: dict[str, list[int]] = {}  # of the last call
        self._num_images = 0

    def __call__(self, scores: Tensor | Scores, prompts: Sequence[Prompt]) -> Tensor:
        """Returns the advantages (A,) of images of any tasks."""
        total = scores if isinstance(scores, Tensor) else scores.total
        advantages = torch.zeros_like(total)
        self._places, self._num_images = {}, len(prompts)
        for task in dict.fromkeys(prompt.task for prompt in prompts):
            places = [i for i, prompt in enumerate(prompts) if prompt.task == task]
            of_task: Any = scores[places]
            advantages[places] = self._by_task[task](of_task, [prompts[i] for i in places])
            self._places[task] = places
        return advantages

    def parts(self) -> dict[str, Tensor]:
        """Returns what each reward adds to the last advantages (A,), by TASK/LABEL; 0 for images of other tasks."""
        found = {}
        for task, places in self._places.items():
            of_task: Any = self._by_task[task]
            for label, part in of_task.parts().items():
                found[f"{task}/{label}"] = torch.zeros(self._num_images).index_put((torch.tensor(places),), part)
        return found

    def metrics(self) -> dict[str, Mapping[str, float]]:
        """Returns the metrics by task."""
        return {task: advantages.metrics() for task, advantages in self._by_task.items()}

    def state_dict(self) -> dict[str, Any]:
        return {task: advantages.state_dict() for task, advantages in self._by_task.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for task, advantages in self._by_task.items():
            advantages.load_state_dict(state[task])


def build_combined(kind: str, how: str, config: AdvantagesConfig, rewards: Sequence[Weighted]) -> Combined:
    """Builds the advantages of a task: of `kind`, with its rewards combined as `how` says."""
    if how == "sum":
        return Summed(build_advantages(kind, config), rewards)
    by_label = {reward.label: build_advantages(kind, config) for reward in rewards}
    return Normalised(by_label, rewards, conditioned=how == "lexicographic")


def part_metrics(parts: Mapping[str, Tensor], total: Tensor) -> dict[str, float]:
    """Returns what each reward adds: its mean size, and its correlation with the advantages (B,), -1 to 1.

    A correlation near 0 is a reward that the others drown.
    """
    metrics = {}
    for label, part in parts.items():
        known = ~(part.isnan() | total.isnan())
        if not known.any():
            continue
        mine, all_ = part[known].double(), total[known].double()
        metrics[f"{label}/abs_mean"] = mine.abs().mean().item()
        mine, all_ = mine - mine.mean(), all_ - all_.mean()
        product = (mine.norm() * all_.norm()).item()
        metrics[f"{label}/correlation"] = (mine @ all_).item() / product if product > 0 else 0.0
    return metrics


def _centred(values: Tensor, prompts: Sequence[Prompt]) -> Tensor:
    """Returns values (B,) minus the mean of their prompt's, or of all if each prompt has one; NaN stays NaN."""
    numbers: dict[Prompt, int] = {}
    group = torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in prompts])
    if len(numbers) == len(prompts):
        group = torch.zeros_like(group)
    centred = values.clone()
    for number in group.unique().tolist():
        here = group == number
        centred[here] = values[here] - values[here].nanmean()
    return centred


def _root_mean_square(values: Tensor) -> float:
    """Returns the root mean square of the values that are there; 0 if none is."""
    known = values[~values.isnan()].double()
    return known.square().mean().sqrt().item() if len(known) else 0.0
