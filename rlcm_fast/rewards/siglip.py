"""The image tower of a SigLIP model in transformers' layout, on which the aesthetic predictor 2.5 computes."""

# B images, E numbers of an embedding

from __future__ import annotations

from typing import Any

from rlcm_fast.rewards.facts import SHARDS, Part, Weights
from rlcm_fast.rewards.models import ModelFiles, Placement
from rlcm_fast.rewards.pixels import HALF, Preparation
from rlcm_fast.rewards.towers import ImageTower, load, pooled, shared

SO400M = Weights(
    "google/siglip-so400m-patch14-384",
    ("config.json", SHARDS),
    3.51,
    "Apache-2.0",
    (Part("image", 428.2, 670.3),),
)


def image_tower(files: ModelFiles, place: Placement) -> ImageTower:
    """The image tower of a SigLIP folder; it embeds with the pooled output, to any length."""
    folder = files.folder()

    def make() -> ImageTower:
        from transformers import SiglipConfig, SiglipVisionModel

        whole: Any = SiglipConfig.from_pretrained(folder, local_files_only=True)
        config = whole.vision_config
        prepare = Preparation(config.image_size, HALF, HALF, fit="squash")
        return ImageTower(load(SiglipVisionModel, folder, place, config), pooled, prepare, place, config.hidden_size)

    return shared("SigLIP images", folder, place, make)
