"""GenEval (arXiv 2310.11513): objects, counts, colours and positions, found by Mask2Former and judged by rules.

    objects    Mask2Former, score above 0.3, for prompts that count above 0.9; at most 16 of a class, best first
    colour     the object's box with everything outside its mask grey (0.6), by CLIP ViT-L/14 zero-shot over 10 colours:
               the largest cosine to the mean of "a photo of a COLOUR NAME", "a photo of a COLOUR-colored NAME" and
               "a photo of a COLOUR object"
    score      geneval_rules.py: graded, strict or the benchmark's, all in [0, 1]

Source and licence: github.com/djghosh13/geneval (MIT), of which nothing is copied. Its detector is a checkpoint of
mmdetection 2; facebook/mask2former-swin-small-coco-instance is the same network trained elsewhere, so a picture near a
threshold may be judged otherwise. CLIP is MIT. Memory: 69 M and 428 M weights, 2.0 GB in fp32; an image costs 0.44
TFLOP, and 0.16 more for a colour.
Test values: the rules have known answers (tests/rewards/test_geneval_rules.py); no score of a picture is published.

Departure: the network runs in float32 only, because boxes and counts hang on thresholds.
"""

# B images of H x W pixels, E numbers of an embedding

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlcm_fast.rewards import clip
from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.geneval_rules import COLOURS, Rule, Wish, judge, wish_of
from rlcm_fast.rewards.mask2former import MASK2FORMER, Instance, segmenter
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.streams import Kept
from rlcm_fast.trajectory import Prompt

_THRESHOLD, _COUNTING_THRESHOLD = 0.3, 0.9
_MOST_OF_A_CLASS = 16
_GREY = 0.6  # #999999
_TEMPLATES = ("a photo of a {colour} {name}", "a photo of a {colour}-colored {name}", "a photo of a {colour} object")
ALIASES = {
    "computer mouse": "mouse",
    "tv remote": "remote",
    "remote control": "remote",
    "computer keyboard": "keyboard",
    "television": "tv",
    "hair dryer": "hair drier",
    "pair of skis": "skis",
    "pair of scissors": "scissors",
}
"""Names of classes in prompts, those of GenEval first, and in the model."""


class GenEval(OnModels):
    """Whether the objects of the prompt are there: how many, in which colour, and where."""

    FACTS: ClassVar[Facts] = Facts(
        formula="rules on Mask2Former's objects: counts, colours, positions; 0 to 1",
        likes="few objects, apart and whole, flat backgrounds; looks do not matter, so add a reward for them",
        weights=(MASK2FORMER, clip.L),
    )
    scope = "image"

    def __init__(
        self,
        model: str = MASK2FORMER.source,
        clip_model: str = clip.L.source,
        rule: Rule = "graded",
        device: str = "same",
        batch_size: int = 4,
    ) -> None:
        """Load the segmenter `model` and the CLIP model for colours, each a folder or hub id."""
        if rule not in get_args(Rule):
            raise ValueError(f"rule={rule} is unknown; give {', '.join(get_args(Rule))}")
        place = Placement.of("fp32", device, batch_size)
        self._files = found(self.files({"model": model, "clip_model": clip_model}))
        self._rule: Rule = rule
        self._segmenter = segmenter(self._files[0], place)
        self._images = clip.image_tower(self._files[1], place)
        self._texts = clip.text_tower(self._files[1], place)
        self._colours: dict[str, Kept] = {}  # (10, E) of each class
        self._lock = threading.Lock()

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the segmenter and of the CLIP model; see OnModels."""
        return [
            ModelFiles("model", arguments["model"], MASK2FORMER),
            ModelFiles("clip_model", arguments["clip_model"], clip.L),
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 in [0, 1] of images (B, 3, H, W) float32 in [0, 1], one prompt each.

        Raises ValueError for a prompt that is not of GenEval's kind, or asks for a class that the model does not know.
        """
        # Find out what is asked for, and find the objects; two thresholds, so two groups of images.
        wishes = [wish_of(prompt) for prompt in prompts]
        names = [{self._known(name): name for name in wish.names} for wish in wishes]
        instances: list[list[Instance]] = [[] for _ in prompts]
        for is_counting, threshold in ((False, _THRESHOLD), (True, _COUNTING_THRESHOLD)):
            rows = [row for row, wish in enumerate(wishes) if wish.is_counting == is_counting]
            of_rows = self._segmenter(images[rows], [names[row].keys() for row in rows], threshold)
            for row, of_image in zip(rows, of_rows, strict=True):
                instances[row] = _named(of_image, names[row])

        # Judge them.
        scores = [self._judge(images[row], wish, instances[row]) for row, wish in enumerate(wishes)]
        return torch.tensor(scores, dtype=torch.float32)

    def _judge(self, image: Tensor, wish: Wish, instances: Sequence[Instance]) -> float:
        def colours_of(taken: Sequence[Instance], name: str) -> list[str]:
            return [self.colour(image, instance, name) for instance in taken]

        return judge(wish, instances, self._rule, colours_of)

    def colour(self, image: Tensor, instance: Instance, name: str) -> str:
        """The colour of an instance in an image (3, H, W)."""
        left, top, right, bottom = instance.box
        outside = ~instance.mask.to(image.device)
        crop = image.masked_fill(outside, _GREY)[:, top:bottom, left:right]
        embedded = self._images.embed(crop[None])  # (1, E)
        return COLOURS[int((self._classifier(name) @ embedded[0]).argmax())]

    def _classifier(self, name: str) -> Tensor:
        """The mean directions (10, E) of the texts that call a class red, orange, ..."""
        with self._lock:
            if name not in self._colours:
                rows = []
                for colour in COLOURS:
                    texts = [template.format(colour=colour, name=name) for template in _TEMPLATES]
                    rows.append(normalize(self._texts.embed(texts), dim=1).mean(dim=0))
                self._colours[name] = Kept.of(normalize(torch.stack(rows), dim=1))
            return self._colours[name].get()

    def _known(self, name: str) -> str:
        """The model's name of a class; raises ValueError if it has none."""
        known = name if name in self._segmenter.names else ALIASES.get(name, name)
        if known not in self._segmenter.names:
            raise ValueError(f"{self._files[0].source} finds no {name!r}; it knows {', '.join(self._segmenter.names)}")
        return known


def _named(instances: Sequence[Instance], names: Mapping[str, str]) -> list[Instance]:
    """The best 16 of each class, by the name that the prompt uses."""
    counts: dict[str, int] = {}
    kept = []
    for instance in instances:
        counts[instance.name] = counts.get(instance.name, 0) + 1
        if counts[instance.name] <= _MOST_OF_A_CLASS:
            kept.append(Instance(names[instance.name], instance.score, instance.box, instance.mask))
    return kept
