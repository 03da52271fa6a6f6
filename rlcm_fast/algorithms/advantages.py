"""Turns rewards into advantages: how much better each image is than others, one number per sample.

    prompt   A = (r - mean_c) / (std_c + epsilon)
             with statistics of the last rewards of the same prompt c: DDPO (arXiv 2305.13301), RLCM (2404.03673)
    batch    A = (r - mean) / sqrt(var + epsilon)
             with statistics of the whole batch: Zhang, Tzeng, Du, Kislyuk (arXiv 2401.12244)
    group    A = (r - mean_g) / (std(r - mean_g) + epsilon)
             with mean_g over the images of the same prompt in this batch: GRPO (arXiv 2402.03300), but see 2.
    leave_one_out
             A = (r - mean over the OTHER images of the prompt) / std: RLOO (arXiv 2402.14740), where std = 1
             (scale none). The baseline does not depend on the reward of the image itself, so the policy gradient stays
             unbiased. For n images it is n / (n - 1) times `group`; the batch's std cancels this factor if n is the
             same for all prompts.

A group whose images all score the same carries no signal: A = 0. The metric `zero_variance_groups` is the share of such
groups, and the update does not run the network on transitions with A = 0.

An image without a score (NaN: its reward failed, on_failure: skip) has no advantage (NaN), and nothing else notices it:
the advantages of the others, and the buffers, are those of a batch that never had it.

Variances divide by n, not by n - 1; all statistics are computed in float64. Call an object of this module with the
rewards and prompts of ALL ranks, gathered in rank order, and slice the result: then every rank holds the same
statistics. They depend on the calls so far and on nothing random, and state_dict is JSON.

Departures from the papers:
 1. prompt: the rewards of a call enter the buffers before any advantage is computed, as in DDPO's code.
 2. group: GRPO divides by the standard deviation of the group, which blows up prompts on which all images score nearly
    alike (arXiv 2503.20783). Here the standard deviation of the centred rewards of the whole batch divides, unless you
    set advantages.scale=group.
"""

# B samples

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from rlcm_fast.config import AdvantagesConfig
from rlcm_fast.trajectory import Prompt

MAX_PROMPTS = 65_536


class Advantages(Protocol):
    """Turns the rewards and prompts of all ranks into advantages."""

    def __call__(self, rewards: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Returns (B,) float32 on the rewards' device, for rewards (B,) float32 with a prompt each; NaN stays NaN."""
        ...

    def metrics(self) -> Mapping[str, Any]:
        """Returns the metrics of the last call."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class _OfScoredImages:
    """Leaves out the images without a score; subclasses compare the others in `_compare`."""

    def __call__(self, rewards: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        if tuple(rewards.shape) != (len(prompts),) or not prompts:
            raise ValueError(
                f"rewards of shape {tuple(rewards.shape)} for {len(prompts)} prompts; give one reward per prompt, of "
                "all ranks, at least one"
            )
        self._check(prompts)
        values: list[float] = rewards.tolist()  # a Python float holds a float32 exactly
        scored = [place for place, value in enumerate(values) if not math.isnan(value)]
        advantages = [math.nan] * len(values)
        if scored:
            found = self._compare([values[place] for place in scored], [prompts[place] for place in scored])
            for place, advantage in zip(scored, found, strict=True):
                advantages[place] = advantage
        return torch.tensor(advantages, dtype=torch.float32, device=rewards.device)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        """Refuses a batch that cannot be compared, with or without scores."""

    def _compare(self, values: list[float], prompts: Sequence[Prompt]) -> list[float]:
        """Returns an advantage for each of `values`, the rewards of the images that have one."""
        raise NotImplementedError


class PromptAdvantages(_OfScoredImages):
    """Standardises by the last rewards of the same prompt; by the batch until a prompt has `min_count` rewards.

    It keeps at most MAX_PROMPTS prompts and forgets those that it saw longest ago; each takes 1 kB on every process.
    """

    def __init__(self, buffer_size: int, min_count: int, epsilon: float = 1e-6) -> None:
        """buffer_size: how many rewards a prompt keeps; min_count: how many it needs for statistics of its own."""
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"advantages.min_count={min_count} must lie between 1 and advantages.buffer_size={buffer_size}, or a"
                " prompt never has enough rewards; raise buffer_size or lower min_count"
            )
        self._buffer_size = buffer_size
        self._min_count = min_count
        self._epsilon = epsilon
        self._buffers: dict[Prompt, deque[float]] = {}

    def _compare(self, values: list[float], prompts: Sequence[Prompt]) -> list[float]:
        for value, prompt in zip(values, prompts, strict=True):
            buffer = self._buffers.pop(prompt, deque(maxlen=self._buffer_size))
            buffer.append(value)
            self._buffers[prompt] = buffer  # at the end, so it is forgotten last
        of_batch = _mean_and_std(values)
        statistics = {prompt: self._statistics(prompt) or of_batch for prompt in dict.fromkeys(prompts)}
        advantages = [
            (value - statistics[prompt][0]) / (statistics[prompt][1] + self._epsilon)
            for value, prompt in zip(values, prompts, strict=True)
        ]
        for prompt in list(islice(self._buffers, max(0, len(self._buffers) - MAX_PROMPTS))):
            del self._buffers[prompt]
        return advantages

    def _statistics(self, prompt: Prompt) -> tuple[float, float] | None:
        """Returns mean and standard deviation of the prompt's buffer; None below min_count rewards."""
        buffer = self._buffers[prompt]
        return _mean_and_std(buffer) if len(buffer) >= self._min_count else None

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Returns the buffers as JSON, which keeps every float exactly."""
        return {
            "buffers": [
                {"text": prompt.text, "task": prompt.task, "metadata": prompt.metadata, "rewards": list(buffer)}
                for prompt, buffer in self._buffers.items()
            ]
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replaces the buffers; a longer buffer keeps its last buffer_size rewards.

        The state of another kind of advantages has no buffers, so every prompt starts with the batch's statistics.
        """
        self._buffers = {
            Prompt(entry["text"], entry["task"], entry.get("metadata", "")): deque(
                entry["rewards"], maxlen=self._buffer_size
            )
            for entry in state.get("buffers", [])
        }


class BatchAdvantages(_OfScoredImages):
    """Standardises over the batch, whatever the prompts; use it for millions of prompts."""

    def __init__(self, epsilon: float = 1e-6) -> None:
        self._epsilon = epsilon

    def _compare(self, values: list[float], prompts: Sequence[Prompt]) -> list[float]:
        mean, std = _mean_and_std(values)
        return [(value - mean) / math.sqrt(std**2 + self._epsilon) for value in values]

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


class GroupAdvantages(_OfScoredImages):
    """Compares images of the same prompt in this batch; a group of equal rewards gets 0."""

    def __init__(self, scale: str = "batch", leaves_one_out: bool = False, epsilon: float = 1e-6) -> None:
        """scale: whose standard deviation divides, "batch", "group" or "none"; leaves_one_out: kind leave_one_out."""
        self._scale = scale
        self._leaves_one_out = leaves_one_out
        self._epsilon = epsilon
        self._zero_variance = 0.0

    def _check(self, prompts: Sequence[Prompt]) -> None:
        if len(set(prompts)) == len(prompts):
            raise ValueError(
                "prompts.images_per_prompt=1 gives advantages.kind=group nothing to compare an image with; use at least"
                " 2 images a prompt, or advantages.kind=prompt"
            )

    def _compare(self, values: list[float], prompts: Sequence[Prompt]) -> list[float]:
        # Group the images by prompt.
        groups: dict[Prompt, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(place)

        # Centre each group and divide by the chosen standard deviation.
        spread = {prompt: _mean_and_std(values[i] for i in places) for prompt, places in groups.items()}
        self._zero_variance = sum(std == 0 for _, std in spread.values()) / len(groups)
        centred = [
            (value - spread[prompt][0]) * self._factor(len(groups[prompt]))
            for value, prompt in zip(values, prompts, strict=True)
        ]
        _, of_batch = _mean_and_std(centred)
        divisors = {
            "batch": [of_batch + self._epsilon] * len(values),
            "group": [spread[prompt][1] + self._epsilon for prompt in prompts],
            "none": [1.0] * len(values),
        }[self._scale]
        return [value / divisor for value, divisor in zip(centred, divisors, strict=True)]

    def _factor(self, size: int) -> float:
        """Returns size / (size - 1) for leave_one_out: r - mean of the others is so many times r - mean of all."""
        return size / (size - 1) if self._leaves_one_out and size > 1 else 1.0

    def metrics(self) -> dict[str, float]:
        return {"zero_variance_groups": self._zero_variance}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def build_advantages(kind: str, config: AdvantagesConfig) -> Advantages:
    """Builds the advantages of a kind; a task may choose another kind than `config.kind`."""
    if kind == "prompt":
        return PromptAdvantages(config.buffer_size, config.min_count)
    if kind == "batch":
        return BatchAdvantages()
    if kind in ("group", "leave_one_out"):
        return GroupAdvantages(config.scale, kind == "leave_one_out")
    raise ValueError(f"advantages.kind={kind} is unknown; use prompt, batch, group or leave_one_out")


def _mean_and_std(values: Iterable[float]) -> tuple[float, float]:
    """Returns mean and standard deviation (divided by n); equal values give exactly that value and 0."""
    values = list(values)
    if min(values) == max(values):  # a sum of n equal numbers divided by n may be off by a rounding
        return values[0], 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
