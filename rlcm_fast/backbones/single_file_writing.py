"""Writes a checkpoint in one file under the original names, as single_file.py reads it, with Stability's metadata.

A latent consistency model has an input for the guidance scale, which the original UNet lacks: a vector that a matrix,
time_embedding.cond_proj, adds to the input of time_embedding.linear_1. For one scale it is a constant, and

    linear_1(t + P w) = W t + (b + W P w)

so the file gets the bias b + W P w, and any tool draws as the model does at that scale, with its own guidance off (CFG
1). P and b are kept under `rlcm_fast.unet.`, where other tools do not look, so that our own input restores the model.
"""

# O I rows and columns of a matrix, w the embedded guidance scale

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from rlcm_fast.backbones.file_kinds import CLIP_PREFIXES, OPENCLIP_PREFIXES, SCHEDULER, UNET_PREFIXES
from rlcm_fast.backbones.lora_layouts import is_sdxl
from rlcm_fast.backbones.original_names import UNetNames, is_vae_matrix, openclip_name, original_vae_name
from rlcm_fast.backbones.single_file import GUIDANCE, OWN, whole_name
from rlcm_fast.file_modes import share

_BIAS = "time_embedding.linear_1.bias"
_HASH = "modelspec.hash_sha256"
_BLANK_HASH = "0x" + "0" * 64


def save_single_file(pipeline: Any, file: Path, dtype: torch.dtype, guidance_scale: float, **metadata: str) -> None:
    """Writes a pipeline, text encoders and VAE included, under the original names, without its textual inversions.

    guidance_scale: what a latent consistency model's UNet is fixed to in other tools; without effect for others.

    Raises:
        ValueError: the VAE is not an AutoencoderKL, or a layer has no original name.
    """
    _write(file_tensors(pipeline, guidance_scale), file, dtype, {**modelspec(pipeline), **metadata})


def file_tensors(pipeline: Any, guidance_scale: float) -> dict[str, Tensor]:
    """Returns the weights of a pipeline by their names in a file; raises ValueError as `save_single_file` does."""
    tensors = unet_tensors(pipeline.unet, guidance_scale) | _vae_tensors(pipeline.vae)
    for name in ("text_encoder", "text_encoder_2"):
        if pipeline.components.get(name) is not None:
            tensors |= _text_tensors(name, pipeline.components[name], pipeline.unet.config)
    added = textual_inversions(pipeline)
    for name, weight in tensors.items():
        if added and name.endswith("token_embedding.weight"):
            tensors[name] = weight[: pipeline.tokenizer.vocab_size]  # other tools want the rows of CLIP and no more
    return tensors


def textual_inversions(pipeline: Any) -> list[str]:
    """Returns the placeholders that were added to a pipeline's tokenizer, such as <cat>, <cat>_1."""
    tokenizer = pipeline.tokenizer
    return [name for name, token in tokenizer.added_tokens_encoder.items() if token >= tokenizer.vocab_size]


def save_unet_file(pipeline: Any, file: Path, dtype: torch.dtype, guidance_scale: float, **metadata: str) -> None:
    """Writes the UNet of a pipeline alone, as `save_single_file` does."""
    _write(unet_tensors(pipeline.unet, guidance_scale), file, dtype, {**modelspec(pipeline), **metadata})


def _write(tensors: Mapping[str, Tensor], file: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
    """Writes the tensors, then the hash of their bytes into its place in the header."""
    ready = {name: weight.detach().to("cpu", dtype).contiguous().clone() for name, weight in tensors.items()}
    save_file(ready, file, {**metadata, _HASH: _BLANK_HASH, "format": "pt"})
    _put_hash(file)
    share(file)


def unet_tensors(unet: Any, guidance_scale: float) -> dict[str, Tensor]:
    """Returns the weights of a UNet by their names in a file; see the module's text for a guidance input."""
    names, weights = UNetNames(unet.config), dict(unet.state_dict())
    found: dict[str, Tensor] = {}
    if GUIDANCE in weights:
        found |= {OWN + GUIDANCE: weights.pop(GUIDANCE), OWN + _BIAS: weights[_BIAS]}
        weights[_BIAS] = bias_at(unet, guidance_scale)
    for name, weight in weights.items():
        original = names.original(name)
        if original is None:
            raise ValueError(f"the original layout has no name for {name}; export --format diffusers")
        found[UNET_PREFIXES[0] + original] = weight
    return found


@torch.no_grad()
def bias_at(unet: Any, guidance_scale: float) -> Tensor:
    """Returns b + W P w, the bias of linear_1 that gives the model at one guidance scale without its input for it."""
    linear, projection = unet.time_embedding.linear_1, unet.time_embedding.cond_proj
    embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    none: Any = None  # the method does not use its pipeline
    w = embed(none, torch.tensor([guidance_scale - 1.0]), projection.in_features)
    added = linear.weight.double() @ (projection.weight.double() @ w[0].double().to(projection.weight.device))
    return (linear.bias.double() + added).to(linear.bias.dtype)


def _vae_tensors(vae: Any) -> dict[str, Tensor]:
    if not isinstance(vae, AutoencoderKL):
        raise ValueError(
            f"a single file holds an AutoencoderKL, and the VAE of this model is an {type(vae).__name__}; use --format"
            " diffusers, or safetensors-unet"
        )
    if vae.config.get("latents_mean") is not None:
        raise ValueError(
            "a single file has no place for latents_mean and latents_std of this model's VAE; use --format diffusers,"
            " or safetensors-unet"
        )
    num_blocks = len(vae.config["block_out_channels"])
    found = {}
    for name, weight in vae.state_dict().items():
        shaped = weight[:, :, None, None] if is_vae_matrix(name) else weight
        found[f"first_stage_model.{original_vae_name(name, num_blocks)}"] = shaped
    return found


def _text_tensors(name: str, encoder: nn.Module, unet_config: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = {whole_name(key): weight for key, weight in encoder.state_dict().items()}
    is_first = name == "text_encoder"
    if is_first and (is_sdxl(unet_config) or family_of(unet_config) == "sd15"):
        prefix = CLIP_PREFIXES[is_sdxl(unet_config)]
        return {prefix + key: weight for key, weight in weights.items()}
    prefix, found = OPENCLIP_PREFIXES[not is_first], {}
    thirds: dict[str, list[Tensor]] = {}
    for key, weight in weights.items():
        spelt, third = openclip_name(key)
        if third is None:
            found[prefix + spelt] = weight.T if spelt == "text_projection" else weight
        else:
            thirds.setdefault(prefix + spelt, [weight] * 3)[third] = weight
    return found | {spelt: torch.cat(parts) for spelt, parts in thirds.items()}


def family_of(unet_config: Mapping[str, Any]) -> str:
    """Returns the family of a UNet: SD 2 differs from 1.5 in the matrices around its transformers."""
    if is_sdxl(unet_config):
        return "sdxl"
    return "sd2" if unet_config.get("use_linear_projection") else "sd15"


def modelspec(pipeline: Any) -> dict[str, str]:
    """Returns the metadata by which tools tell what a file is (Stability's model spec 1.0.1), and the scheduler."""
    unet, scheduler = pipeline.unet.config, dict(pipeline.scheduler.config)
    family, is_v = family_of(unet), scheduler.get("prediction_type") == "v_prediction"
    size = unet["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    of_sd2 = "stable-diffusion-v2-768-v" if is_v else "stable-diffusion-v2-512"
    architecture = {"sd15": "stable-diffusion-v1", "sd2": of_sd2, "sdxl": "stable-diffusion-xl-v1-base"}[family]
    return {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.prediction_type": "v" if is_v else "epsilon",
        "modelspec.resolution": f"{width * pipeline.vae_scale_factor}x{height * pipeline.vae_scale_factor}",
        SCHEDULER: json.dumps({key: value for key, value in scheduler.items() if key != "_diffusers_version"}),
    }


def _put_hash(file: Path) -> None:
    """Writes the SHA-256 of the tensors' bytes in the place that was left for it."""
    with file.open("r+b") as content:
        length = int.from_bytes(content.read(8), "little")
        place = 8 + content.read(length).index(_BLANK_HASH.encode())
        digest = hashlib.file_digest(content, "sha256").hexdigest()  # of what follows the header
        content.seek(place)
        content.write(f"0x{digest}".encode())
