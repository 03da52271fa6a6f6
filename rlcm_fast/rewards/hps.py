"""Human Preference Score v2 (arXiv 2306.09341), versions 2.1 (`hps_v2`) and 2.0 (`hps_v2_0`).

    cos(image, prompt)      about 0.2 to 0.35; published tables are times 100 (2.1: SD 1.4 25.35, SDXL 30.63)

The original resizes the longest side to 224 pixels and pads with black; so does this. A square image has no padding.

Source and licence: xswu/HPSv2, HPS_v2.1_compressed.pt and HPS_v2_compressed.pt, open_clip's ViT-H/14 tuned on people's
choices, exact GELU; Apache-2.0. Memory: 986 M weights, 3.9 GB in fp32. Any CLIP tokenizer is right, they all have the
same vocabulary: `tokenizer` names where to take it from.
Test value: the repository's demo_image.jpg and "cat with horn", version 2.1: 0.288.

The file is a .pt in open_clip's layout. Only tensors are read of it, never code, and the weights get the names of
transformers' CLIPModel as they load. `python -m rlcm_fast.rewards.hps FILE.pt FOLDER` writes them as safetensors, which
`model: FOLDER` then takes.
"""

# B images

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlcm_fast.file_modes import share
from rlcm_fast.rewards import clip
from rlcm_fast.rewards.clip_score import cosine
from rlcm_fast.rewards.facts import CLIP_WORDS, Facts, Weights
from rlcm_fast.rewards.heads import read_tensors
from rlcm_fast.rewards.models import ModelFiles, OnModels, Placement, found
from rlcm_fast.rewards.pixels import Preparation
from rlcm_fast.rewards.towers import ImageTower, TextTower, load, shared
from rlcm_fast.trajectory import Prompt

FILES = {"2.1": "HPS_v2.1_compressed.pt", "2.0": "HPS_v2_compressed.pt"}
_CONVERTED = "model.safetensors"
_SOURCE = "xswu/HPSv2"
_WORDS = Weights(clip.L.source, CLIP_WORDS, 0.004, "MIT")
_NUM_HEADS = 16  # of both towers of a ViT-H/14

_NAMES = {  # open_clip's, in this order -> CLIPModel's
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "visual.proj": "visual_projection.weight",
    "visual.transformer.resblocks": "vision_model.encoder.layers",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "transformer.resblocks": "text_model.encoder.layers",
    "ln_final": "text_model.final_layer_norm",
    "text_projection": "text_projection.weight",
    "logit_scale": "logit_scale",
}
_NAMES_OF_A_LAYER = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TRANSPOSED = ("visual_projection.weight", "text_projection.weight")
_DROPPED = ("attn_mask",)


def _facts(version: str) -> Facts:
    weights = Weights(_SOURCE, (f"{FILES[version]}|{_CONVERTED}", "config.json?"), 3.94, "Apache-2.0", clip.H_PARTS)
    return Facts(
        formula="the cosine of image and prompt in a CLIP ViT-H/14 tuned on people's choices, about 0.2 to 0.35",
        likes="glossy, saturated, sharp pictures; drifts to one polished style, whatever the prompt asks for",
        weights=(weights, _WORDS),
    )


class HpsV2(OnModels):
    """The cosine of image and prompt in a CLIP model that learned what people prefer; version 2.1."""

    FACTS: ClassVar[Facts] = _facts("2.1")
    scope = "image"

    def __init__(
        self,
        model: str = _SOURCE,
        tokenizer: str = _WORDS.source,
        dtype: str = "fp32",
        device: str = "same",
        batch_size: int = 32,
    ) -> None:
        """Load both towers of `model`: a .pt file, a folder (of the .pt, or converted), or a hub id."""
        place = Placement.of(dtype, device, batch_size)
        self._files = found(self.files({"model": model, "tokenizer": tokenizer}))
        self._images, self._texts = _towers(self._files[0], self._files[1], place)

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The file of the weights and those of a CLIP tokenizer; see OnModels."""
        weights, words = cls.FACTS.weights
        return [
            ModelFiles("model", arguments["model"], weights),
            ModelFiles("tokenizer", arguments["tokenizer"], words),
        ]

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1], one prompt each."""
        texts = self._texts.embed([prompt.text for prompt in prompts])
        return cosine(self._images.embed(images), texts)


class HpsV20(HpsV2):
    """The same, with the weights of version 2.0."""

    FACTS: ClassVar[Facts] = _facts("2.0")


def _towers(model: ModelFiles, tokenizer: ModelFiles, place: Placement) -> tuple[ImageTower, TextTower]:
    """The image tower and the text tower of a file of open_clip's layout, or of a converted one."""
    file = model.file()

    def make_images() -> ImageTower:
        from transformers import CLIPVisionModelWithProjection

        tensors, config = _read(file)
        network = load(CLIPVisionModelWithProjection, tensors, place, config.vision_config)
        prepare = Preparation(config.vision_config.image_size, fit="pad")
        return ImageTower(network, clip.embed_images, prepare, place, config.projection_dim)

    def make_texts() -> TextTower:
        from transformers import CLIPTextModelWithProjection

        tensors, config = _read(file)
        network = load(CLIPTextModelWithProjection, tensors, place, config.text_config)
        limit = config.text_config.max_position_embeddings
        return TextTower(network, clip.embed_text, clip.clip_tokens(tokenizer.folder(), limit, model.source), place)

    return shared("HPS images", file, place, make_images), shared("HPS texts", file, place, make_texts)


def convert(file: Path, folder: Path) -> None:
    """Write the weights of a .pt file as `folder`/model.safetensors with a config.json, as transformers' CLIPModel."""
    tensors, config = _read(file)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / _CONVERTED, {"format": "pt"})
    share(folder)
    config.save_pretrained(folder)


def _read(file: Path) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a file by their names in CLIPModel, and its CLIPConfig; ValueError if it is of another layout."""
    tensors = dict(read_tensors(file))
    if file.name != _CONVERTED:
        tensors = renamed(tensors)
    try:
        return tensors, _config(tensors)
    except KeyError as error:
        raise ValueError(f"model={file} holds no CLIP model: {error.args[0]} is missing") from error


def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in open_clip's layout by their names in CLIPModel; raises ValueError for a name that is in neither."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in _DROPPED:
            continue
        prefix = next((prefix for prefix in _NAMES if name == prefix or name.startswith(f"{prefix}.")), None)
        if prefix is None:
            raise ValueError(f"{name} is no tensor of an open_clip model; give {' or '.join(FILES.values())}")
        whole = _NAMES[prefix] + name.removeprefix(prefix)
        if "attn.in_proj_" in whole:
            of_layer, kind = whole.split("attn.in_proj_")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{of_layer}self_attn.{part}_proj.{kind}"] = rows
            continue
        for theirs, ours in _NAMES_OF_A_LAYER.items():
            whole = whole.replace(f".{theirs}.", f".{ours}.")
        out[whole] = tensor.T if whole in _TRANSPOSED else tensor
    return out


def _config(tensors: Mapping[str, Tensor]) -> Any:
    """The CLIPConfig of tensors by their names in CLIPModel: all sizes are their shapes."""
    from transformers import CLIPConfig

    patches = tensors["vision_model.embeddings.patch_embedding.weight"]  # (width, 3, patch, patch)
    num_positions = len(tensors["vision_model.embeddings.position_embedding.weight"])
    words = tensors["text_model.embeddings.token_embedding.weight"]
    projection = len(tensors["visual_projection.weight"])
    vision = {
        **_sizes(tensors, "vision_model", projection),
        "patch_size": patches.shape[-1],
        "image_size": patches.shape[-1] * round((num_positions - 1) ** 0.5),
    }
    text = {
        **_sizes(tensors, "text_model", projection),
        "vocab_size": len(words),
        "max_position_embeddings": len(tensors["text_model.embeddings.position_embedding.weight"]),
        "eos_token_id": len(words) - 1,
    }
    return CLIPConfig(vision_config=vision, text_config=text, projection_dim=projection)


def _sizes(tensors: Mapping[str, Tensor], tower: str, projection: int) -> dict[str, Any]:
    """The settings that both towers have."""
    layers = {name.split(".")[3] for name in tensors if name.startswith(f"{tower}.encoder.layers.")}
    inner, width = tensors[f"{tower}.encoder.layers.0.mlp.fc1.weight"].shape
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": len(layers),
        "num_attention_heads": _NUM_HEADS,
        "hidden_act": "gelu",  # quick_gelu is off by 3e-3
        "projection_dim": projection,
    }


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
