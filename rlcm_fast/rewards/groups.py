"""Turns the values of a set reward into a score for each image: makes the groups and shares out their values.

A group is `group_size` neighbours in the batch. The repeats of a prompt lie side by side, so groups of
prompts.images_per_prompt images show one prompt, and groups of a multiple of it span several prompts. Groups never span
tasks, because each task's rewards score only its own images. Image i of a group g of k images gets the credit c_i,
where v is the reward's value of a set:

    group            c_i = v(g)                    arXiv 2401.12244
    leave_one_out    c_i = v(g) - v(g without i)

v(g without i) does not depend on image i, so E[v(g without i) grad log p(i)] = 0 for independent images. Both credits
therefore have the same expected policy gradient, that of E[v(g)], and a reward weight means the same with either. They
differ in noise: v(g) carries into the credit of every image what the other k - 1 images happened to be. Take a policy
of three colours, a parity reward, and the variance of the gradient over all outcomes. With leave_one_out, the variance
is 0.28 (k = 3) and 0.18 (k = 6) of that with group. If nine in ten images have one colour, it is 1.38 and 0.49
(tests/rewards/test_set_rewards.py). So leave_one_out is a baseline, and like any baseline it does not help everywhere.
An advantage that is divided by a standard deviation loses the scale of either credit, but keeps its ratio of signal to
noise. If v(g) is the mean of scores s_j, leave_one_out gives (s_i - mean of the others) / k. So with either credit, a
set reward balances an image reward of the same scale if its weight is k times as large.
"""

# N images of all micro-batches, F numbers that describe one image, G groups of k images

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rlcm_fast.rewards.base import ScoreError, SetReward, expect, first_not_finite
from rlcm_fast.trajectory import Prompt


@dataclass
class GroupReward:
    """A set reward with its groups.

    If you call it like an image reward, it makes groups of just the images that you pass.
    """

    name: str
    reward: SetReward
    group_size: int = 0  # images per group; 0 makes one group of all images
    credit: Literal["group", "leave_one_out"] = "group"
    scope: str = field(default="set", init=False)

    @property
    def gives_all_the_same(self) -> bool:
        """Tells whether all images of a group get the same credit."""
        return self.credit == "group"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The credits (B,) float32 of images (B, 3, H, W), which must make whole groups."""
        described = expect(self.reward.describe(images, prompts), (len(prompts), None), "a row per image")
        return self.values_and_credits(described, self.groups(len(images)))[1]

    def values(self, described: Tensor, groups: Tensor) -> Tensor:
        """The value (G,) float32 of each of `groups` (G, k) of rows of described (N, F); NaN if no member is described.

        A row of NaN is an image without a description; its group goes on without it. Raises ScoreError if a value is
        not a finite number.
        """
        values = torch.full((len(groups),), torch.nan)
        for numbers, members in _described(described, groups):
            values[numbers] = self._value(described, members, members[:, 0])
        return values

    def values_and_credits(self, described: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """The value of each image's group and the credit of each image, both (N,) float32; described is (N, F).

        Both are NaN for an image without a description, and the credit of an image whose group has nobody left to
        leave one out of.
        """
        values = torch.full((len(described),), torch.nan)
        credits = values.clone()
        for _, members in _described(described, groups):
            of_groups = self._value(described, members, members[:, 0])
            values[members] = of_groups[:, None].expand_as(members)
            if self.credit == "group":
                credits[members] = values[members]
            elif members.shape[1] > 1:
                # One image at a time: all at once would need k times the memory of the descriptions.
                for i in range(members.shape[1]):
                    others = torch.cat([members[:, :i], members[:, i + 1 :]], dim=1)
                    credits[members[:, i]] = of_groups - self._value(described, others, members[:, i])
        return values, credits

    def groups(self, num_images: int) -> Tensor:
        """The positions in the batch of each group's images, (G, k) int64; raises ValueError if a group is not full."""
        size = self.group_size or num_images
        if num_images % size:
            raise ValueError(
                f"rewards: name={self.name} group_size={size} does not divide the {num_images} images; give a size "
                "that does, or 0 for all of them"
            )
        if size == 1 and self.credit == "leave_one_out":
            raise ValueError(
                f"rewards: name={self.name} credit=leave_one_out leaves nothing of a group of one image; give "
                "groups of 2 or more"
            )
        return torch.arange(num_images).reshape(-1, size)

    def _value(self, described: Tensor, rows: Tensor, blamed: Tensor) -> Tensor:
        """The values (G,) of the groups `rows` (G, k); an error about a group names its image in `blamed` (G,)."""
        with torch.no_grad():
            returned = self.reward.value(described[rows])
        try:
            values = expect(returned, (len(rows),), "one value per group").cpu()
        except ScoreError as error:
            raise ScoreError(f"value() {error}", int(blamed[0])) from error
        first = first_not_finite(values)
        if first is not None:
            problem = f"value() returned {values[first].item()} for group {first} of {rows.shape[1]} images"
            raise ScoreError(f"{problem}; values must be finite", int(blamed[first]))
        return values


def _described(described: Tensor, groups: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The members of `groups` (G, k) that have a description, in parts of groups with equally many.

    Yields the numbers (P,) of the groups of a part and their members (P, s); s is k if no row of described (N, F) is
    missing.
    """
    is_there = ~described.isnan().any(dim=1)[groups]  # (G, k)
    sizes = is_there.sum(dim=1)
    for size in sizes.unique().tolist():
        if size > 0:
            numbers = (sizes == size).nonzero()[:, 0]
            yield numbers, groups[numbers][is_there[numbers]].reshape(-1, size)


def side_by_side(prompts: Sequence[Prompt]) -> list[int]:
    """The positions of `prompts`, reordered so that equal prompts lie side by side, as in a rollout."""
    first: dict[Prompt, int] = {}
    for position, prompt in enumerate(prompts):
        first.setdefault(prompt, position)
    return sorted(range(len(prompts)), key=lambda position: first[prompts[position]])
