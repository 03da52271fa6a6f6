"""From the images of a set reward to the score of each: which images make a group, and how it shares out its value.

Groups are neighbours in the batch, `group_size` at a time; the repeats of a prompt lie side by side, so groups of
prompts.images_per_prompt are one prompt's images and multiples of it cross prompts. They never cross tasks, as each
task's rewards are asked of its images alone. The image i of a group g of k images gets, with v the reward's value of a
set:

    group            c_i = v(g)                    arXiv 2401.12244
    leave_one_out    c_i = v(g) - v(g without i)

v(g without i) does not depend on the image i, so with independent images E[v(g without i) grad log p(i)] = 0: both have
the same expected policy gradient, that of E[v(g)], and need no factor for a weight to mean the same. What differs is
the noise, as v(g) carries into every image's credit what the k - 1 others happened to be. Over all outcomes of a policy
of three colours rewarded for parity, the variance of leave_one_out's gradient is 0.28 (k = 3) and 0.18 (k = 6) of the
other's; where nine in ten images are of one colour 1.38 and 0.49 (tests/rewards/test_set_rewards.py): it is a baseline,
and like any not better everywhere. An advantage that is divided by a standard deviation loses the scale of either
credit, not its ratio of signal to noise. Where v(g) is the mean of scores s_j, leave_one_out gives
(s_i - mean of the others) / k: so with either credit a set reward is on a par with an image reward of its scale at k
times that one's weight.
"""

# N images of all micro-batches, F numbers that describe one, G groups of k images

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlcm_fast.rewards.base import AnswerError, SetReward, expect, first_not_finite
from rlcm_fast.trajectory import Prompt


@dataclass
class GroupReward:
    """A set reward with its groups; called as an image reward is, it takes the images it is given for all."""

    name: str
    reward: SetReward
    group_size: int = 0  # images of a group; 0: all that it is given
    credit: Literal["group", "leave_one_out"] = "group"
    scope: str = field(default="set", init=False)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32, the credits of images (B, 3, H, W) that make whole groups."""
        described = expect(self.reward.describe(images, prompts), (len(prompts), None), "a row per image")
        return self.score(described, self.groups(len(images)))[1]

    def values(self, described: Tensor, groups: Tensor) -> Tensor:
        """The value of each of `groups` (G, k), (G,) float32; described (N, F). AnswerError where it is no number."""
        return self._value(described, groups, groups[:, 0])

    def score(self, described: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """For each of the N images its group's value and what it gets of it, both (N,) float32; described (N, F)."""
        values = self.values(described, groups).repeat_interleave(groups.shape[1])
        credits = values.clone()
        if self.credit == "leave_one_out":
            for i in range(groups.shape[1]):  # one by one: all at once would take k times the descriptions' memory
                others = torch.cat([groups[:, :i], groups[:, i + 1 :]], dim=1)
                credits[groups[:, i]] -= self._value(described, others, groups[:, i])
        return values, credits

    def groups(self, num_images: int) -> Tensor:
        """The places in the batch of each group's images, (G, k) int64; ValueError if one is not full."""
        size = self.group_size or num_images
        if num_images % size:
            raise ValueError(
                f"rewards: name={self.name} group_size={size} does not divide the {num_images} images; give a size "
                "that does, or 0 for all of them"
            )
        if size == 1 and self.credit == "leave_one_out":
            raise ValueError(
                f"rewards: name={self.name} credit=leave_one_out has nothing to leave in a group of one image; give "
                "groups of 2 or more"
            )
        return torch.arange(num_images).reshape(-1, size)

    def _value(self, described: Tensor, rows: Tensor, blamed: Tensor) -> Tensor:
        """The values (G,) of the groups `rows` (G, k); an error names the group's image `blamed` (G,)."""
        with torch.no_grad():
            answer = self.reward.value(described[rows])
        try:
            values = expect(answer, (len(rows),), "one value per group").cpu()
        except AnswerError as error:
            raise AnswerError(f"value() {error}", int(blamed[0])) from error
        first = first_not_finite(values)
        if first is not None:
            problem = f"value() returned {values[first].item()} for group {first} of {rows.shape[1]} images"
            raise AnswerError(f"{problem}; values must be finite", int(blamed[first]))
        return values


def side_by_side(prompts: Sequence[Prompt]) -> list[int]:
    """The places of `prompts` in an order that has the repeats of each beside each other, as in a rollout."""
    first: dict[Prompt, int] = {}
    for place, prompt in enumerate(prompts):
        first.setdefault(prompt, place)
    return sorted(range(len(prompts)), key=lambda place: first[prompts[place]])
