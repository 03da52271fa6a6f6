"""A text-to-image model without its weights: the configs of its parts, and modules on the meta device built from them.

folder, or id of a hub model whose configs are shipped in architectures/ -> Architecture -> modules without memory
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from rlcm_fast.backbones.model_files import read_json

_SHIPPED = Path(__file__).resolve().parent / "architectures"
_VAES = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
_TEXT_ENCODERS = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


Size = int | tuple[int, int]  # of both sides, or height and width


def sides(size: Any) -> tuple[int, int]:
    """Returns height and width of a size, which may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class Architecture:
    """The configs of a model's parts, as diffusers and transformers write them."""

    name: str
    unet: dict[str, Any]
    vae: dict[str, Any]
    text_encoders: tuple[dict[str, Any], ...]

    @property
    def image_size(self) -> Size:
        """Pixels per side, or height and width, by the UNet's config; the trainer draws images of this size."""
        height, width = sides(self.unet["sample_size"])
        scale = self.pixels_per_latent
        return height * scale if height == width else (height * scale, width * scale)

    @property
    def pixels_per_latent(self) -> int:
        blocks = self.vae.get("block_out_channels") or self.vae["decoder_block_out_channels"]
        return 2 ** (len(blocks) - 1)

    @property
    def embeds_guidance(self) -> bool:
        """Whether the UNet has an input for the guidance scale; others need a second, unconditional row."""
        return bool(self.unet.get("time_cond_proj_dim"))

    @property
    def vae_overflows(self) -> bool:
        """Whether the VAE overflows in float16 by its config, as SDXL's own does; the trainer then does not try it."""
        return len(self.text_encoders) > 1 and bool(self.vae.get("force_upcast", True))

    def with_vae(self, path: str) -> Architecture:
        """Returns the same model with another VAE: a folder's by its config, any other as one that float16 suits."""
        file = Path(path) / "config.json"
        other = {"force_upcast": False}
        vae: dict[str, Any] = read_json(file, f"model.vae={path}") if file.is_file() else {**self.vae, **other}
        _check(f"model.vae={path}", "vae", vae.get("_class_name"), list(_VAES))
        return replace(self, vae=vae)

    @property
    def num_tokens(self) -> int:
        return self.text_encoders[0]["max_position_embeddings"]

    def build_unet(self, device: str = "meta") -> Any:
        """Builds the UNet on `device`, with random weights unless it is meta; the methods below do the same."""
        with torch.device(device):
            return UNet2DConditionModel.from_config(self.unet)

    def build_vae(self, device: str = "meta") -> Any:
        with torch.device(device):
            return _VAES[self.vae["_class_name"]].from_config(self.vae)

    def build_text_encoders(self, device: str = "meta") -> list[nn.Module]:
        with torch.device(device):
            return [_TEXT_ENCODERS[c["architectures"][0]](CLIPTextConfig(**c)) for c in self.text_encoders]


def load_architecture(path: str) -> Architecture:
    """Reads the config.json files of a diffusers folder, or the configs that we ship for a hub id; uses no network.

    Raises:
        ValueError: the folder lacks a part or has one that the trainer cannot use; we ship no configs for the hub id.
    """
    # Read the configs, from the folder or from those that we ship.
    folder = Path(path)
    if folder.is_dir():
        second = folder / "text_encoder_2"
        text_encoders = [_part(folder, "text_encoder")] + ([_part(folder, second.name)] if second.is_dir() else [])
        unet, vae = _part(folder, "unet"), _part(folder, "vae")
    else:
        models = _shipped("models")
        if path not in models:
            known = ", ".join(models)
            raise ValueError(f"model.path={path} is not known without a network; give a folder, or one of {known}")
        parts = models[path]
        unet, vae = _shipped(parts["unet"]) | parts["unet_changes"], _shipped(parts["vae"])
        text_encoders = [_shipped(name) for name in parts["text_encoders"]]

    # Refuse classes that the planner cannot build.
    named = f"model.path={path}"
    _check(named, "unet", unet.get("_class_name"), ["UNet2DConditionModel"])
    _check(named, "vae", vae.get("_class_name"), list(_VAES))
    for config in text_encoders:
        _check(named, "text_encoder", (config.get("architectures") or [None])[0], list(_TEXT_ENCODERS))
    return Architecture(path, unet, vae, tuple(text_encoders))


def _part(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path={folder} has no {name}/config.json; give a folder that diffusers saved whole")
    return read_json(file, f"model.path={folder}")


def _shipped(name: str) -> dict[str, Any]:
    return json.loads((_SHIPPED / f"{name}.json").read_text(encoding="utf-8"))


def _check(named: str, part: str, found: str | None, known: list[str]) -> None:
    if found not in known:
        raise ValueError(f"{named} has a {part} of class {found}; the planner knows {', '.join(known)}")
