"""Refuses values in the configs of a model's parts that nothing here would obey, or that no network can have.

The pipelines of diffusers (Stable Diffusion, SDXL, latent consistency) are the measure: what they read is read here
alike, and what they would ignore or fail on is refused. Imports no torch; every error names file, field and way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlcm_fast.backbones.model_files import refusal
from rlcm_fast.finite_json import is_number

UNET, VAES = "UNet2DConditionModel", ("AutoencoderKL", "AutoencoderTiny")
TEXT_ENCODERS = ("CLIPTextModel", "CLIPTextModelWithProjection")
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")

Config = Mapping[str, Any]

_OF_OTHERS = {
    "class_embed_type": "its UNet wants class labels",
    "num_class_embeds": "its UNet wants class labels",
    "encoder_hid_dim_type": "its UNet wants other encodings than those of CLIP",
    "encoder_hid_dim": "its UNet wants other encodings than those of CLIP",
}
_A_MODEL = "give a text-to-image model like Stable Diffusion's or SDXL's"


class PartConfig:
    """Config of one part, with the words that name it in an error."""

    def __init__(self, named: str, place: str, config: Config) -> None:
        """named: what the user gave; place: the file, such as unet/config.json."""
        self._named, self._place, self.config = named, place, config

    def __getitem__(self, key: str) -> Any:
        return self.config.get(key)

    def refuse(self, key: str, reason: str, remedy: str) -> ValueError:
        """Returns the error of a value."""
        return refusal(self._named, f"{self._place} says {key}={self.config.get(key)}: {reason}", remedy)

    def belongs_to(self, name: str, known: tuple[str, ...]) -> ValueError:
        """Returns the error of a config of another class."""
        return refusal(self._named, f"its {self._place} belongs to class {name}", f"give one of {' or '.join(known)}")

    def count(self, key: str, default: int | None, least: int = 1) -> int:
        """Returns a whole number of at least `least`; a field that is missing or null has the default, if there is one.

        Raises:
            ValueError: it is something else.
        """
        value = default if self.config.get(key) is None else self.config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refuse(key, f"no whole number from {least} on", "correct it, or download the folder anew")
        return value


def check_class(part: PartConfig, known: tuple[str, ...]) -> None:
    """Raises ValueError if a config belongs to a class that is none of the known ones."""
    name = part["_class_name"]
    if name is not None and name not in known:
        raise part.belongs_to(name, known)


def check_unet(part: PartConfig, has_own_size: bool) -> int:
    """Returns the number of latent channels of a UNet.

    has_own_size: `model.image_size` or its like says the size of images.

    Raises:
        ValueError: a field is damaged, or the UNet has inputs that no text-to-image pipeline gives it.
    """
    # Refuse other inputs and outputs than latents, timesteps and texts.
    channels, out_channels = part.count("in_channels", 4), part.count("out_channels", 4)
    if channels != out_channels:
        raise part.refuse("in_channels", f"and out_channels={out_channels}: an inpainting or editing model", _A_MODEL)
    for key, reason in _OF_OTHERS.items():
        if part[key] is not None:
            raise part.refuse(key, reason, _A_MODEL)
    if part["addition_embed_type"] not in (None, "text_time"):
        raise part.refuse("addition_embed_type", "an input that is not known here", _A_MODEL)
    if part["time_cond_proj_dim"] is not None:
        part.count("time_cond_proj_dim", None)

    # Find the size of images.
    size = part["sample_size"]
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    if not has_own_size and any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise part.refuse("sample_size", "no size of latents", "set --model.image_size, such as 512")
    return channels


def check_vae(part: PartConfig, unet_channels: int | None, is_sdxl: bool) -> None:
    """Raises ValueError if a VAE makes other latents than the UNet reads, or asks for a scaling that nothing obeys.

    unet_channels: latent channels of the UNet; None if they are not known yet.
    """
    # Compare its channels with the UNet's and with those of images.
    latent_channels = part.count("latent_channels", 4)
    if unet_channels not in (None, latent_channels):
        reason = f"the UNet has in_channels={unet_channels}"
        raise part.refuse(
            "latent_channels", reason, "give a VAE and a UNet of one model (no inpainting or editing one)"
        )
    for key in ("in_channels", "out_channels"):
        if part.count(key, 3) != 3:
            raise part.refuse(key, "images have 3 channels", "give a VAE of images")

    # Check the scaling of latents.
    factor = part.config.get("scaling_factor", 0.18215)
    if not is_number(factor) or factor <= 0.0:
        raise part.refuse("scaling_factor", "latents cannot be divided by it", "write 0.18215 (SDXL: 0.13025) there")
    if part["shift_factor"] not in (None, 0, 0.0):
        raise part.refuse("shift_factor", "the pipelines of Stable Diffusion and SDXL ignore it", "set it to null")
    _check_statistics(part, latent_channels, is_sdxl)


def _check_statistics(part: PartConfig, latent_channels: int, is_sdxl: bool) -> None:
    """Raises ValueError for latents_mean and latents_std that SDXL's pipeline could not read, or another ignores."""
    given = {key: part[key] for key in ("latents_mean", "latents_std") if part[key] is not None}
    for key, numbers in given.items():
        if not is_sdxl:
            ways_out = "set it to null to draw as that pipeline does"
            raise part.refuse(key, "only the pipeline of SDXL reads it; those of Stable Diffusion ignore it", ways_out)
        if len(given) == 1:
            raise part.refuse(key, "it needs the other one of latents_mean and latents_std", "give both, or neither")
        is_list = isinstance(numbers, list) and len(numbers) == latent_channels
        if not is_list or not all(is_number(one) for one in numbers):
            raise part.refuse(key, f"no list of {latent_channels} numbers", "correct it, or set both to null")
        if key == "latents_std" and min(numbers) <= 0.0:
            raise part.refuse(key, "a standard deviation is above 0", "correct it, or set both to null")


def check_text_encoder(part: PartConfig) -> int:
    """Returns the width of a text encoder; raises ValueError if its config is damaged."""
    for key, default in (("num_hidden_layers", 12), ("num_attention_heads", 8), ("vocab_size", 49408)):
        part.count(key, default)
    width = part.count("hidden_size", 512)
    if width % part.count("num_attention_heads", 8):
        raise part.refuse(
            "hidden_size", "no multiple of num_attention_heads", "correct it, or download the folder anew"
        )
    return width


def check_tokenizer(part: PartConfig, encoder: PartConfig) -> None:
    """Raises ValueError if a tokenizer makes longer texts than its encoder takes, or puts padding before a text."""
    longest, length = encoder.count("max_position_embeddings", 77), part["model_max_length"]
    if not is_number(length) or not 3 <= length <= longest:
        raise part.refuse("model_max_length", f"the text encoder takes 3 to {longest} tokens", f"write {longest} there")
    if part["padding_side"] not in (None, "right"):
        raise part.refuse("padding_side", "texts here are padded behind their end", "write right there")
    if part["truncation_side"] not in (None, "right"):
        raise part.refuse("truncation_side", "texts here keep their beginning if they are cut", "write right there")
