"""Refuses settings of texts that a model has no use for; reads its configs, and no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from transformers import CLIPTextConfig

from rlcm_fast.backbones.loading import ModelPaths, resolve_model
from rlcm_fast.backbones.texts import TextSettings
from rlcm_fast.config import ModelConfig

FIELDS = ("model.clip_skip", "prompts.negative")
"""Fields that messages name; a tool passes its own options."""


def check_configs(model: ModelConfig, settings: TextSettings, fields: Sequence[str] = FIELDS) -> None:
    """Raises ValueError as the two functions below do, before weights load; default settings read nothing.

    What cannot be found or read passes, because loading it says why; so does the UNet of a single file, whose header is
    its config. `check_pipeline` sees them.
    """
    if settings.clip_skip is None and not settings.prompts.negative:
        return
    try:
        paths = resolve_model(model)
        text_configs, unet_config = _text_configs(paths, model), _unet_config(paths, model)
    except (OSError, ValueError):
        return
    _check(settings, text_configs, unet_config, fields)


def check_pipeline(pipeline: Any, settings: TextSettings, fields: Sequence[str] = FIELDS) -> None:
    """Raises ValueError as the two functions below do, for a loaded pipeline."""
    names = [name for name in ("text_encoder", "text_encoder_2") if name in pipeline.components]
    _check(settings, [pipeline.components[name].config for name in names], pipeline.unet.config, fields)


def _check(
    settings: TextSettings, text_configs: Sequence[Any], unet_config: Mapping[str, Any], fields: Sequence[str]
) -> None:
    clip_skip, negative = settings.clip_skip, settings.prompts.negative
    if clip_skip is not None:
        check_clip_skip(f"{fields[0]}={clip_skip}", clip_skip, text_configs)
    if negative:
        check_negative(f"{fields[1]}={negative}", unet_config)


def check_clip_skip(named: str, clip_skip: int, text_configs: Sequence[Any]) -> None:
    """Raises ValueError if no layer of a text encoder would be left; SDXL's leave out their last one anyway."""
    is_sdxl = len(text_configs) == 2
    most = min(config.num_hidden_layers for config in text_configs) - (2 if is_sdxl else 1)
    if clip_skip > most:
        remedy = f"give 1 to {most}, or leave it out" if most > 0 else "leave it out"
        raise ValueError(f"{named} leaves no layer of this model's text encoder; {remedy}")


def check_negative(named: str, unet_config: Mapping[str, Any]) -> None:
    """Raises ValueError if the guidance scale is an input of the UNet, which then never sees a negative prompt."""
    if unet_config.get("time_cond_proj_dim") is not None:
        raise ValueError(
            f"{named} has no use: the guidance scale is an input of this model's UNet, which never sees a negative "
            "prompt; leave it out, or give a model with classifier-free guidance"
        )


def _text_configs(paths: ModelPaths, model: ModelConfig) -> list[Any]:
    revision = model.revision if paths.unet is None else None
    index: Any = DiffusionPipeline.load_config(paths.pipeline, revision=revision)
    names = [name for name in ("text_encoder", "text_encoder_2") if name in index]
    where: Any = {"revision": revision or "main"}
    return [CLIPTextConfig.from_pretrained(paths.pipeline, subfolder=name, **where) for name in names]


def _unet_config(paths: ModelPaths, model: ModelConfig) -> Any:
    if paths.kind is not None:
        return {}
    if paths.unet is not None:
        return UNet2DConditionModel.load_config(paths.unet, revision=model.revision)
    return UNet2DConditionModel.load_config(paths.pipeline, subfolder="unet", revision=model.revision)
