"""Rewards a group of images for spreading an attribute evenly: the fairness reward of arXiv 2401.12244, section 4.2.

    r(group) = -sum_a (p_hat(a) - target(a))^2,        p_hat(a) = mean of the members' votes for class a

p_hat is a mean over the members that vote at all. An image in which the classifier finds nothing to classify has a row
of zeros and no vote. Such images cost nothing here, so you need a second reward that keeps the pictures intact. A group
without any vote gets the worst possible value, that of a group that votes only for the class with the smallest target.
"""

# B images, A classes, G groups of k images

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from rlcm_fast.plugins import build, load_class
from rlcm_fast.rewards.models import ModelFiles, OnModels, files_of
from rlcm_fast.trajectory import Prompt

CLASSIFIERS = {
    "shapes_colour": "rlcm_fast.shapes.colour:ColourClassifier",
    "skin_tone": "rlcm_fast.rewards.skin_tone:SkinTone",
}


@runtime_checkable
class CountsClasses(Protocol):
    """A classifier that declares its number of classes, so that a wrong target fails before there are images."""

    num_classes: int  # A


class DistributionParity(OnModels):
    """Minus the squared distance between the votes of a group and a target distribution; at most 0."""

    scope = "set"

    def __init__(
        self,
        classifier: str,
        votes: Literal["soft", "hard"] = "soft",
        target: Sequence[float] | None = None,
        classifier_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        """Make the classifier, a key of CLASSIFIERS or "package.module:Class", with `classifier_arguments`.

        The classifier is called with (images, prompts) and returns (B, A) probabilities. With votes="hard" it may
        return any scores, and the largest gets the whole vote. A row of zeros is no vote. target: A probabilities;
        None means uniform.
        """
        # Refuse settings that cannot work.
        if votes not in ("soft", "hard"):
            raise ValueError(f"votes={votes} is unknown; give soft (probabilities) or hard (the likeliest class)")
        if target is not None and not _is_distribution(target):
            raise ValueError(f"target={target} is no distribution; give a list of numbers from 0 to 1 that sum to 1")

        # Make the classifier; compare the target with its classes, if it declares them.
        self._classifier = build(classifier, classifier_arguments or {}, CLASSIFIERS, "classifier")
        self._is_hard = votes == "hard"
        self._target = target
        if isinstance(self._classifier, CountsClasses):
            self._check_target(self._classifier.num_classes)

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the classifier; see OnModels."""
        factory = load_class(arguments["classifier"], CLASSIFIERS, "classifier")
        return files_of(factory, arguments["classifier_arguments"])

    @classmethod
    def part(cls, arguments: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The classifier; see OnModels."""
        if "classifier" not in arguments:  # the constructor says so better
            return None
        return "classifier_arguments", load_class(arguments["classifier"], CLASSIFIERS, "classifier")

    @property
    def used(self) -> dict[str, Any]:
        """What the classifier computes on; see OnModels."""
        return self._classifier.used if isinstance(self._classifier, OnModels) else {}

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The votes (B, A) float32 of images (B, 3, H, W) float32 in [0, 1]; each row is a distribution or zeros."""
        scores = self._classifier(images, prompts).float()
        if scores.ndim != 2 or not torch.isfinite(scores).all():
            raise ValueError(
                f"the classifier returned scores of shape {tuple(scores.shape)}; return (B, A), all finite"
            )
        self._check_target(scores.shape[-1])
        votes_at_all = scores.ne(0).any(dim=1, keepdim=True)
        if self._is_hard:
            return torch.zeros_like(scores).scatter_(1, scores.argmax(dim=1, keepdim=True), 1.0) * votes_at_all
        sums = scores.sum(dim=1, keepdim=True)
        if (scores < 0).any() or ((sums - 1).abs() > 1e-3).logical_and(votes_at_all).any():
            raise ValueError(
                "votes=soft needs probabilities: rows that sum to 1, or to 0 for no vote; or set votes=hard"
            )
        return scores

    def value(self, described: Tensor) -> Tensor:
        """The values (G,) float32 of the votes described (G, k, A) float32."""
        num_votes = described.sum(dim=(1, 2))  # (G,)
        target = self._target_of(described)
        p_hat = described.sum(dim=1) / num_votes.clamp(min=0.5)[:, None]  # (G, A); 0.5 lies between no vote and one
        worst = 1 - 2 * target.min() + target.square().sum()
        return -torch.where(num_votes > 0, (p_hat - target).square().sum(dim=1), worst)

    def _check_target(self, num_classes: int) -> None:
        if self._target is not None and len(self._target) != num_classes:
            raise ValueError(
                f"target={list(self._target)} is not one number for each of {num_classes} classes; give {num_classes} "
                "numbers, or leave it out for a uniform target"
            )

    def _target_of(self, described: Tensor) -> Tensor:
        num_classes = described.shape[-1]
        return described.new_tensor(self._target if self._target is not None else [1 / num_classes] * num_classes)


def _is_distribution(target: Any) -> bool:
    is_list = isinstance(target, Sequence) and all(isinstance(p, int | float) and p >= 0 for p in target)
    return is_list and math.isclose(sum(target), 1, abs_tol=1e-6)
