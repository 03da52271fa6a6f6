"""What a rollout leaves behind: prompts, their encodings, the visited states and the log-probs of the actions.

Data flow: a policy's `sample` makes a `Trajectory`; the rollout concatenates the trajectories of its micro-batches; the
update takes `transitions` in any order, mixes samples and steps, and hands them to the policy's `log_prob`. Images of
several sizes make a `MixedTrajectory`, which holds a `Trajectory` of each size and has the same methods.

Latents are float32 here, whatever the dtype of the network. Rollout and training cast the SAME stored state to the
network's dtype, so the ratio is exactly one before the first update.
"""

# B samples, B_i of image size i, K actions, N transitions, D distinct prompts, L tokens, E embedding,
# P pooled embedding, C H W latent

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One text to draw, and the task (prompt source with its rewards and statistics) that it belongs to."""

    text: str
    task: str = "default"
    metadata: str = ""  # a JSON object with what rewards know beyond the text, such as its objects; text can be hashed

    @property
    def details(self) -> dict[str, Any]:
        """Returns the metadata as a dictionary; empty without metadata."""
        return json.loads(self.metadata) if self.metadata else {}


@dataclass(frozen=True)
class Conditioning:
    """The text encodings of a batch: one row per distinct prompt, and the row of each sample."""

    prompt_embeds: Tensor  # (D, L, E)
    index: Tensor  # (B,) int64, the row of prompt_embeds of each sample
    negative_embeds: Tensor | None = None  # (1, L, E), for classifier-free guidance; None if guidance is embedded
    pooled_embeds: Tensor | None = None  # (D, P), of SDXL's second text encoder; None for models with one encoder
    negative_pooled: Tensor | None = None  # (1, P)
    time_ids: Tensor | None = None  # (1, 6) float32, SDXL's original size, crop and target size, height first
    latent_size: tuple[int, int] | None = None  # H and W of the latents to draw; None: as the network's config says

    @property
    def embeds(self) -> Tensor:
        """The encoding of each sample (B, L, E); every access gathers it anew."""
        return self.prompt_embeds[self.index]

    @property
    def pooled(self) -> Tensor | None:
        """The pooled encoding of each sample (B, P); every access gathers it anew."""
        return None if self.pooled_embeds is None else self.pooled_embeds[self.index]

    def by_sample(self) -> Conditioning:
        """Returns the same with a row of prompt_embeds per sample, so that shapes do not depend on distinct prompts."""
        index = torch.arange(len(self.index), device=self.index.device)
        return replace(self, prompt_embeds=self.embeds, pooled_embeds=self.pooled, index=index)

    def take(self, rows: Tensor | slice) -> Conditioning:
        """Returns the conditioning of the samples `rows` (N,); it shares the encodings and copies nothing."""
        return replace(self, index=self.index[rows])


@dataclass(frozen=True)
class Transitions:
    """Single actions of a trajectory in any order: the unit that updates shuffle and split."""

    x_t: Tensor  # (N, C, H, W) float32, the state before the action
    x_s: Tensor  # (N, C, H, W) float32, the action: the next state
    step: Tensor  # (N,) int64 in [0, K), the row of the schedule
    sample: Tensor  # (N,) int64 in [0, B), the sample of the trajectory: the row of its advantage
    log_prob_old: Tensor  # (N,) float32, mean over C, H, W, at rollout time
    conditioning: Conditioning  # its index is (N,)


@dataclass(frozen=True)
class Trajectory:
    """The visited states of a batch of samples and the log-probs of its actions."""

    latents: Tensor  # (B, K + 1, C, H, W) float32, the state before each action and after the last
    log_probs: Tensor  # (B, K) float32, mean over C, H, W, at rollout time
    conditioning: Conditioning

    @property
    def num_samples(self) -> int:
        return self.log_probs.shape[0]

    @property
    def num_actions(self) -> int:
        return self.log_probs.shape[1]

    @property
    def num_transitions(self) -> int:
        return self.log_probs.numel()

    @property
    def size_of(self) -> Tensor:
        """The image size of each sample, (B,) int64: all have the size 0."""
        return torch.zeros(self.num_samples, dtype=torch.int64)

    def part(self, size: int) -> Trajectory:
        """Returns the trajectories of the samples of an image size."""
        return self

    def inner(self, rows: Tensor) -> Tensor:
        """Returns where transitions of one image size, flat indices b * K + k, lie in the part that holds them."""
        return rows

    def with_log_probs(self, log_probs: Tensor) -> Trajectory:
        """Returns the trajectory with other log-probs (B, K)."""
        return replace(self, log_probs=log_probs)

    def transitions(self, rows: Tensor) -> Transitions:
        """Returns the transitions `rows` (N,) int64, flat indices b * K + k; copies states on the latents' device."""
        rows = rows.to(self.latents.device)
        sample, step = rows // self.num_actions, rows % self.num_actions
        return Transitions(
            x_t=self.latents[sample, step],
            x_s=self.latents[sample, step + 1],
            step=step,
            sample=sample,
            log_prob_old=self.log_probs[sample, step],
            conditioning=self.conditioning.take(sample),
        )

    @staticmethod
    def cat(parts: Sequence[Trajectory]) -> Trajectory:
        """Joins the samples of all `parts` in order; all parts must share one prompt_embeds object."""
        if not parts:
            raise ValueError("parts=[] holds no trajectory; give at least one")
        first = parts[0].conditioning
        if any(part.conditioning.prompt_embeds is not first.prompt_embeds for part in parts):
            raise ValueError(
                "parts=... have different prompt_embeds tables; encode the distinct prompts of the batch once and give"
                " each part Conditioning.take(rows) of it"
            )
        index = torch.cat([part.conditioning.index for part in parts])
        return Trajectory(
            latents=torch.cat([part.latents for part in parts]),
            log_probs=torch.cat([part.log_probs for part in parts]),
            conditioning=replace(first, index=index),
        )


@dataclass(frozen=True)
class MixedTrajectory:
    """The trajectories of samples of several image sizes, one for each size."""

    parts: Sequence[Trajectory]  # of size 0, 1, ...
    samples: Sequence[Tensor]  # (B_i,) int64 in [0, B), the sample of this trajectory that each sample of a part is

    @property
    def num_samples(self) -> int:
        return sum(part.num_samples for part in self.parts)

    @property
    def num_actions(self) -> int:
        return self.parts[0].num_actions

    @property
    def num_transitions(self) -> int:
        return self.num_samples * self.num_actions

    @cached_property
    def size_of(self) -> Tensor:
        """The image size of each sample, (B,) int64: the part that holds it."""
        sizes = [torch.full_like(samples, index) for index, samples in enumerate(self.samples)]
        return torch.cat(sizes)[self._places]

    @cached_property
    def log_probs(self) -> Tensor:
        """The log-probs of all samples, (B, K) float32 at rollout time."""
        joined = torch.cat([part.log_probs for part in self.parts])
        return joined[self._places.to(joined.device)]

    @cached_property
    def _places(self) -> Tensor:
        """The place of each sample if the parts are joined, (B,) int64."""
        return torch.cat(list(self.samples)).argsort()

    def with_log_probs(self, log_probs: Tensor) -> MixedTrajectory:
        """Returns the trajectory with other log-probs (B, K)."""
        of_parts = [log_probs[samples.to(log_probs.device)] for samples in self.samples]
        parts = [replace(part, log_probs=own) for part, own in zip(self.parts, of_parts, strict=True)]
        return MixedTrajectory(parts, self.samples)

    def transitions(self, rows: Tensor) -> Transitions:
        """Returns the transitions `rows` (N,) int64, flat indices b * K + k of samples of one size."""
        rows = rows.cpu()
        found = self.part(self._size(rows)).transitions(self.inner(rows))
        # Name their samples as this trajectory does, because advantages lie in that order.
        return replace(found, sample=(rows // self.num_actions).to(found.sample.device))

    def part(self, size: int) -> Trajectory:
        """Returns the trajectories of the samples of an image size."""
        return self.parts[size]

    def inner(self, rows: Tensor) -> Tensor:
        """Returns where transitions of one image size, flat indices b * K + k, lie in the part that holds them."""
        sample, step = rows // self.num_actions, rows % self.num_actions
        return torch.searchsorted(self.samples[self._size(rows)], sample) * self.num_actions + step

    def _size(self, rows: Tensor) -> int:
        sizes = self.size_of[rows // self.num_actions]
        assert bool((sizes == sizes[0]).all()), "transitions of several image sizes are no batch"
        return int(sizes[0])


AnyTrajectory = Trajectory | MixedTrajectory


def by_size(trajectory: AnyTrajectory, rows: Tensor) -> dict[int, Tensor]:
    """Returns the places in `rows` (N,), flat indices b * K + k, of each image size that there is, in ascending order.

    All processes get as many, because they draw the same sizes for their samples.
    """
    sizes = trajectory.size_of[rows.cpu() // trajectory.num_actions]
    return {size: (sizes == size).nonzero().flatten() for size in sizes.unique().tolist()}


def micro_batches(trajectory: AnyTrajectory, rows: Tensor, most: int) -> list[Tensor]:
    """Cuts transitions `rows` (N,) into micro-batches of at most `most`, each of one image size; returns places."""
    return [part for places in by_size(trajectory, rows).values() for part in places.split(most)]


@dataclass(frozen=True)
class Batch:
    """The transitions of a micro-batch, which have one image size."""

    size: int
    rows: Tensor  # (n,) int64 on the device, flat indices b * K + k in the part of this size
    signals: Tensor  # (n,) float32 on the device


def batches(trajectory: AnyTrajectory, rows: Tensor, signals: Tensor, places: Sequence[Tensor]) -> list[Batch]:
    """Returns the micro-batches `places`, each of one image size, of transitions rows (N,) with signals (N,).

    rows and places are on the CPU. They are copied to the device of the signals all at once.
    """
    lengths = [len(part) for part in places]
    sizes = [int(trajectory.size_of[rows[part[0]] // trajectory.num_actions]) for part in places]
    inner = torch.cat([trajectory.inner(rows[part]) for part in places]).to(signals.device)
    chosen = signals[torch.cat(list(places)).to(signals.device)]
    return [Batch(*each) for each in zip(sizes, inner.split(lengths), chosen.split(lengths), strict=True)]
