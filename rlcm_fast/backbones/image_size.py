"""Finds the size of a model's images before it loads, by the configs in its folder or in the hub's cache."""

from __future__ import annotations

from pathlib import Path

from rlcm_fast.backbones.loading import resolve_model
from rlcm_fast.backbones.model_files import read_json
from rlcm_fast.config import ModelConfig
from rlcm_fast.hub import cached_folder


def pixels_before_loading(model: ModelConfig) -> tuple[int, int] | None:
    """Returns height and width of the images, the first of several sizes; None where only loading shows them."""
    if model.pixels is not None:
        return model.pixels
    paths = resolve_model(model)
    named = f"model.path={model.path}"
    is_alone = paths.unet is not None and paths.kind is None  # a UNet that goes into another pipeline
    place, name = (paths.unet, "config.json") if is_alone else (paths.pipeline, "unet/config.json")
    unet, vae = _config(str(place), name, model.revision), _config(paths.pipeline, "vae/config.json", model.revision)
    if unet is None or vae is None:
        return None
    size = read_json(unet, named).get("sample_size")
    blocks = read_json(vae, named).get("block_out_channels") or read_json(vae, named).get("decoder_block_out_channels")
    sides = [size, size] if isinstance(size, int) else size
    if not isinstance(sides, list) or not isinstance(blocks, list):
        return None
    height, width = (side * 2 ** (len(blocks) - 1) for side in sides)
    return height, width


def _config(place: str, name: str, revision: str | None) -> Path | None:
    """Returns the file of a folder, or that of a hub id in the cache; None if it is not on this machine."""
    folder = cached_folder(place, name, revision)
    return None if folder is None else folder / name
