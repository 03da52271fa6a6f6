"""What a rollout leaves behind: prompts, their encodings, the visited states and the log-probs of the actions.

Data flow: a policy's `sample` makes a `Trajectory`; the rollout concatenates the trajectories of its micro-batches; the
update takes `transitions` in any order, mixes samples and steps, and hands them to the policy's `log_prob`.

Latents are float32 here, whatever the dtype of the network. Rollout and training cast the SAME stored state to the
network's dtype, so the ratio is exactly one before the first update.
"""

# B samples, K actions, N transitions, D distinct prompts, L tokens, E embedding, P pooled embedding, C H W latent

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
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

    @property
    def embeds(self) -> Tensor:
        """The encoding of each sample (B, L, E); every access gathers it anew."""
        return self.prompt_embeds[self.index]

    @property
    def pooled(self) -> Tensor | None:
        """The pooled encoding of each sample (B, P); every access gathers it anew."""
        return None if self.pooled_embeds is None else self.pooled_embeds[self.index]

    def take(self, rows: Tensor) -> Conditioning:
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
