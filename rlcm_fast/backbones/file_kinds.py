"""What a checkpoint in one file holds, by the names and shapes in its header; reads no weights and imports no torch.

model.diffusion_model.   UNet               first_stage_model.   VAE
cond_stage_model.        text encoder       conditioner.         SDXL's two text encoders
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlcm_fast.config.files import local_path

LAYOUTS = Path(__file__).resolve().parent / "layouts"  # families, as diffusers folders without weights
UNET_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
CLIP_PREFIXES = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPENCLIP_PREFIXES = ("cond_stage_model.model.", "conditioner.embedders.1.model.")
SCHEDULER = "rlcm_fast.scheduler"  # in the metadata of our files

PICKLES = (".ckpt", ".pt", ".pth", ".bin")
SAFE = ".safetensors"
_MOST_BYTES_OF_A_HEADER = 100_000_000  # the limit of safetensors itself
_FAMILIES = {768: "sd15", 1024: "sd2", 2048: "sdxl"}  # by the width of the text that the UNet attends to
_SUBJECTS = {"lora_": "a LoRA; give it as model.loras", "hada_": "a LoHa", "lokr_": "a LoKr"}


@dataclass(frozen=True)
class FileKind:
    """What a checkpoint holds."""

    path: Path
    family: str | None  # a folder in LAYOUTS; None for widths of no known model
    parts: frozenset[str]  # of unet, vae, text_encoder, text_encoder_2
    unet_prefix: str
    is_diffusers: bool  # the UNet has diffusers' names
    prediction: str | None  # epsilon or v_prediction, if the file says so
    metadata: Mapping[str, str]
    is_zero_snr: bool = False  # its noise levels end at pure noise


def is_checkpoint(path: str) -> bool:
    """Tells whether a path means a checkpoint in one file, on this machine."""
    place = local_path(path)
    return place.is_file() or place.suffix.lower() in (SAFE, *PICKLES)


def refuse_pickle(path: Path, field: str) -> None:
    """Raises ValueError, which begins with `field`, for a file that is a pickle by its name or by its first bytes."""
    head = b""
    if path.is_file() and path.suffix.lower() not in PICKLES:
        with path.open("rb") as file:
            head = file.read(8)
    # torch.save writes a zip archive, or in old versions a pickle of protocol 2 and more.
    is_pickle = head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04"))
    if path.suffix.lower() in PICKLES or (is_pickle and int.from_bytes(head, "little") > _MOST_BYTES_OF_A_HEADER):
        raise ValueError(
            f"{field} is a pickle, and reading one runs any code that is in it; convert it to .safetensors first, with"
            " ComfyUI's or A1111's own tools or with safetensors.torch.save_file where you trust it"
        )


def read_header(path: Path, field: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the tensors of a safetensors file, {name: {dtype, shape, ...}}, and its metadata.

    Raises:
        ValueError: it is a pickle, missing, or no safetensors file; the message begins with `field`.
    """
    refuse_pickle(path, field)
    if not path.is_file():
        raise ValueError(f"{field} does not exist; give a .safetensors file, a diffusers folder or a hub id")
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if length <= _MOST_BYTES_OF_A_HEADER else None
        except (ValueError, RecursionError):
            header = None
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    num_bytes = None if header is None or metadata is None else num_tensor_bytes(header)
    if num_bytes is None or not isinstance(header, dict) or not isinstance(metadata, dict):
        raise ValueError(f"{field} is no safetensors file, or is damaged; download it again")
    size, expected = path.stat().st_size, 8 + length + num_bytes
    if size < expected:
        raise ValueError(f"{field} is cut off: it has {size} of {expected} bytes; download it again")
    return header, metadata


def num_tensor_bytes(header: Any) -> int | None:
    """Returns how many bytes follow the header of a safetensors file, without its metadata; None if it is damaged."""
    try:
        if not all(isinstance(size, int) for entry in header.values() for size in entry.get("shape", ())):
            return None
        return max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (AttributeError, OverflowError, KeyError, IndexError, TypeError, ValueError):
        return None


def kind_of(path: Path, field: str) -> FileKind:
    """Returns what a checkpoint holds; raises ValueError if it holds no UNet that can be trained here."""
    tensors, metadata = read_header(path, field)
    prefix, is_diffusers = _place_of_unet(tensors, field)
    first = f"{prefix}{'conv_in' if is_diffusers else 'input_blocks.0.0'}.weight"
    if not all(len(entry.get("shape", ())) == 4 for name, entry in tensors.items() if name == first):
        raise ValueError(f"{field} has {first} of another shape than a convolution, or is damaged; download it again")
    channels = tensors[first]["shape"][1]
    if channels != 4:
        raise ValueError(f"{field} has a UNet with {channels} input channels (inpainting, editing); give one with 4")
    shapes = {name: entry.get("shape") for name, entry in tensors.items() if name.endswith("attn2.to_k.weight")}
    keys = [shape for shape in shapes.values() if shape]
    width = keys[0][-1] if keys else None
    if width == 1280:
        raise ValueError(f"{field} is SDXL's refiner, which draws no image by itself; give the base model")
    other = next((name for name in tensors if name.startswith("edm_")), None)
    if other is not None:  # marks of Playground 2.5, which ComfyUI reads
        raise ValueError(f"{field} was trained with EDM's noise ({other}), which is not known here; give another model")
    prediction = {"v": "v_prediction", "epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
    if "v_pred" in tensors:  # a mark that ComfyUI reads, too
        prediction = "v_prediction"
    return FileKind(
        path, _FAMILIES.get(width or 0), _parts(tensors), prefix, is_diffusers, prediction, metadata, "ztsnr" in tensors
    )


def _place_of_unet(tensors: Mapping[str, Any], field: str) -> tuple[str, bool]:
    """Returns the prefix of the UNet's names, and whether they are diffusers'."""
    for prefix in UNET_PREFIXES:
        for name, is_diffusers in (("input_blocks.0.0.weight", False), ("conv_in.weight", True)):
            time = "time_embedding.linear_1.weight" if is_diffusers else "time_embed.0.weight"
            if f"{prefix}{name}" in tensors and f"{prefix}{time}" in tensors:
                return prefix, is_diffusers
    for name in tensors:
        for mark, subject in _SUBJECTS.items():
            if mark in name:
                raise ValueError(f"{field} is {subject}, not a checkpoint ({name})")
    example = f" (its first name is {next(iter(tensors))})" if tensors else ""
    raise ValueError(
        f"{field} holds no UNet of Stable Diffusion's kind{example}; give a checkpoint of Stable Diffusion 1.5, 2 or"
        " SDXL"
    )


def _parts(tensors: Mapping[str, Any]) -> frozenset[str]:
    parts = {"unet"}
    if has_prefix(tensors, ("first_stage_model.", "vae.")):
        parts.add("vae")
    if has_prefix(tensors, (*CLIP_PREFIXES, "cond_stage_model.model.")):
        parts.add("text_encoder")
    if has_prefix(tensors, ("conditioner.embedders.1.model.",)):
        parts.add("text_encoder_2")
    return frozenset(parts)


def has_prefix(names: Mapping[str, Any], prefixes: Sequence[str]) -> bool:
    return any(name.startswith(tuple(prefixes)) for name in names)
