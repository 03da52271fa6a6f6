"""LAION's aesthetic predictor, the aesthetic reward of RLCM (arXiv 2404.03673) and DDPO (arXiv 2305.13301).

    aesthetic        w . e / |e| + b    e: the CLIP ViT-L/14 embedding; w, b: five linear layers without activation
    aesthetic_v2_5   the same of the pooled output of SigLIP so400m at 384 pixels, with another head

About 1 to 10, where 5 to 6 is good; version 2 cannot leave -12.8 to 23.2, since |w| = 17.9956 and b = 5.2366.

Source and licence: github.com/christophschuhmann/improved-aesthetic-predictor, Apache-2.0, file
sac+logos+ava1-l14-linearMSE.pth of 3,714,759 bytes; CLIP is MIT. Version 2.5 (github.com/discus0434/
aesthetic-predictor-v2-5) is AGPL-3.0, code and weights: nothing of it ships here, and you name its file yourself.
Memory: 304 M weights, 1.2 GB in fp32; version 2.5 428 M, 1.7 GB.
Test values of the heads alone, for a zero vector, 1/sqrt(E) everywhere, and the first unit vector: 5.2366, 4.8833,
4.5451 (version 2); 1.9390, 3.6183, 2.7093 (version 2.5).
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rlcm_fast.rewards import clip, siglip
from rlcm_fast.rewards.facts import Facts, Weights
from rlcm_fast.rewards.heads import AffineHead, multiply_out, read_tensors
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.self_tests import SelfTest
from rlcm_fast.rewards.towers import ImageTower
from rlcm_fast.trajectory import Prompt

HEAD = Weights(
    "ttj/sac-logos-ava1-l14-linearMSE",
    ("sac+logos+ava1-l14-linearMSE.pth|model.safetensors",),
    0.004,
    "Apache-2.0",
    where="github.com/christophschuhmann/improved-aesthetic-predictor, or a copy on the Hugging Face hub",
)
HEAD_2_5 = Weights(
    "",
    ("aesthetic_predictor_v2_5.pth",),
    0.003,
    "AGPL-3.0",
    where="github.com/discus0434/aesthetic-predictor-v2-5",
)


class Aesthetic(OnModels):
    """How much people would like the look of an image, by version 2 of LAION's predictor."""

    FACTS: ClassVar[Facts] = Facts(
        formula="an affine map of the unit CLIP ViT-L/14 embedding, about 1 to 10",
        likes="painterly, glowing pictures; all become one centred subject before a blurred background",
        weights=(clip.L_IMAGES, HEAD),
    )
    scope = "image"
    _bias: ClassVar = 5.2366  # of the published head
    _layers: ClassVar = ("layers", (0, 2, 4, 6, 7))  # where the head's file has its linear layers

    def __init__(
        self,
        model: str = clip.L_IMAGES.source,
        head: str = HEAD.source,
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 32,
    ) -> None:
        """Load the image tower of `model`, a folder or hub id, and the file `head`, which may be a hub id, too."""
        place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model, "head": head}))
        self._tower = self._image_tower(self._files[0], place)
        self._head = self._read_head(self._files[1]).to(place.device)

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files of the tower and of the head; see OnModels."""
        of_model, of_head = cls.FACTS.weights
        return [ModelFiles("model", arguments["model"], of_model), ModelFiles("head", arguments["head"], of_head)]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1]; ignores the prompts."""
        return self._head(normalize(self._tower.embed(images), dim=1))

    def self_test(self) -> SelfTest | None:
        """The published head, of a zero vector."""
        of_head = self._files[1]
        if Path(of_head.source).name not in (Path(HEAD.source).name, *of_head.names()):
            return None
        return SelfTest("the head, of a zero vector,", self._head.bias.item(), self._bias, 1e-3)

    def _image_tower(self, files: ModelFiles, place: Placement) -> ImageTower:
        return clip.image_tower(files, place)

    def _read_head(self, files: ModelFiles) -> AffineHead:
        """The head, multiplied out; raises ValueError if the file holds another."""
        prefix, layers = self._layers
        try:
            return multiply_out(read_tensors(files.file()), prefix, layers, self._tower.width)
        except ValueError as error:
            raise ValueError(f"head={files.source} {error}; give {' or '.join(files.names())}") from error


class AestheticV25(Aesthetic):
    """The same question, asked of version 2.5, whose file you name yourself, because its licence is AGPL-3.0."""

    FACTS: ClassVar[Facts] = Facts(
        formula="an affine map of the unit SigLIP so400m embedding, about 1 to 10, where 5.5 is already great",
        likes="finished illustrations and photographs; less than version 2 one kind of picture",
        weights=(siglip.SO400M, HEAD_2_5),
    )
    _bias: ClassVar = 1.9390
    _layers: ClassVar = ("scoring_head", (0, 2, 4, 6, 8))

    def __init__(
        self,
        head: str,
        model: str = siglip.SO400M.source,
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 32,
    ) -> None:
        """Load the image tower of `model`, a folder or hub id, and the file `head`."""
        super().__init__(model, head, dtype, device, batch_size)

    def _image_tower(self, files: ModelFiles, place: Placement) -> ImageTower:
        return siglip.image_tower(files, place)
