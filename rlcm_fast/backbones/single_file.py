"""A checkpoint in one file, in the layout of CompVis' and Stability's code, which ComfyUI and A1111 read and write.

    read:   model.safetensors [+ a pipeline for what it lacks] -> the parts of a diffusers pipeline
    write:  a pipeline -> model.safetensors, with Stability's metadata (modelspec)

Both go by the names of the model's own weights (original_names.py), so a missing tensor is named, and what the model
has no use for (an average of the weights, position ids) is left alone. No network is used.

A latent consistency model has an input for the guidance scale, which the original UNet lacks: a vector that a matrix,
time_embedding.cond_proj, adds to the input of time_embedding.linear_1. For one scale it is a constant, and

    linear_1(t + P w) = W t + (b + W P w)

so the file gets the bias b + W P w, and any tool draws as the model does at that scale, with its own guidance off (CFG
1). P and b are kept under `rlcm_fast.unet.`, where other tools do not look, so that our own input restores the model.
"""

# O I rows and columns of a matrix, w the embedded guidance scale

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline, SchedulerMixin, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlcm_fast.backbones.file_kinds import (
    CLIP_PREFIXES,
    LAYOUTS,
    OPENCLIP_PREFIXES,
    SCHEDULER,
    UNET_PREFIXES,
    VAE_PREFIXES,
    FileKind,
    read_header,
)
from rlcm_fast.backbones.lora_layouts import is_sdxl
from rlcm_fast.backbones.networks import check_finite
from rlcm_fast.backbones.original_names import UNetNames, is_vae_matrix, openclip_name, original_vae_name

OWN = "rlcm_fast.unet."  # what the original layout has no place for
_GUIDANCE, _BIAS = "time_embedding.cond_proj.weight", "time_embedding.linear_1.bias"
_HASH = "modelspec.hash_sha256"
_BLANK_HASH = "0x" + "0" * 64

Find = Callable[[str], Tensor | None]  # a tensor of the file; None if it has none of that name


def load_parts(
    kind: FileKind, base: str, unet_dtype: torch.dtype, with_vae: bool, unet_changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Reads the parts that a file holds, as modules on the CPU; what it lacks is not in the result.

    base: the diffusers folder or hub id whose configs are used; `unet_changes` go into that of the UNet.

    Raises:
        ValueError: weights are missing or do not fit the configs.
    """
    with _opened(kind.path) as find:
        parts: dict[str, Any] = {
            "unet": _load_unet(kind, {**_unet_config(kind, base), **unet_changes}, find, unet_dtype)
        }
        if with_vae and "vae" in kind.parts:
            parts["vae"] = _load_vae(base, find)
        for name in ("text_encoder", "text_encoder_2"):
            if name in kind.parts:
                parts[name] = _load_text_encoder(name, base, find, kind)
    if Path(base).parent == LAYOUTS:
        parts |= tokenizers(kind.family)
    return parts


def load_vae(file: Path, base: str) -> AutoencoderKL:
    """Reads a VAE in a file of its own, with original or diffusers' names; configs are those of `base`."""
    with _opened(file) as find:
        return _load_vae(base, find)


def tokenizers(family: str | None) -> dict[str, CLIPTokenizer]:
    """Returns CLIP's tokenizers of a family; OpenCLIP's pad texts with the token 0, an exclamation mark."""
    merges = gzip.decompress((LAYOUTS / "clip_merges.txt.gz").read_bytes()).decode("utf-8").split("\n")
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: number for number, word in enumerate(words)}
    pairs: Any = [tuple(merge.split()) for merge in merges]

    def tokenizer(pad: str) -> CLIPTokenizer:
        return CLIPTokenizer(vocab=vocabulary, merges=pairs, pad_token=pad, model_max_length=77)

    first = tokenizer("!" if family == "sd2" else "<|endoftext|>")
    return {"tokenizer": first, "tokenizer_2": tokenizer("!")} if family == "sdxl" else {"tokenizer": first}


def scheduler_of(kind: FileKind) -> Any:
    """Returns the scheduler that a file of ours names; None for files of others."""
    text = kind.metadata.get(SCHEDULER)
    if text is None:
        return None
    import diffusers

    config = json.loads(text)
    known: Any = getattr(diffusers, config["_class_name"], None)
    if not (isinstance(known, type) and issubclass(known, SchedulerMixin)):
        raise ValueError(f"{kind.path} names the scheduler {config['_class_name']}, which diffusers does not have")
    kind_of_scheduler: Any = known
    return kind_of_scheduler.from_config(config)


@contextmanager
def _opened(file: Path) -> Iterator[Find]:
    """Opens a file of weights, whose tensors are read one by one."""
    names = frozenset(read_header(file, str(file))[0])
    with safe_open(file, framework="pt") as content:
        yield lambda name: content.get_tensor(name) if name in names else None


def _unet_config(kind: FileKind, base: str) -> dict[str, Any]:
    """Returns the UNet's config of `base`, with the size of images that the file names."""
    loaded: Any = UNet2DConditionModel.load_config(base, subfolder="unet")
    config = dict(loaded)
    vae: Any = AutoencoderKL.load_config(base, subfolder="vae")
    size = kind.metadata.get("modelspec.resolution", "").split("x")
    if len(size) == 2 and all(side.isdecimal() and int(side) > 0 for side in size):
        width, height = (int(side) // 2 ** (len(vae["block_out_channels"]) - 1) for side in size)
        config["sample_size"] = height if height == width else [height, width]
    return config


def _load_unet(kind: FileKind, config: dict[str, Any], find: Find, dtype: torch.dtype) -> UNet2DConditionModel:
    names = UNetNames(config)

    def weight_of(name: str) -> Tensor | None:
        own = find(OWN + name)
        if own is not None:
            return own
        spelt = name if kind.is_diffusers else names.original(name)
        return None if spelt is None else find(kind.unet_prefix + spelt)

    guidance = weight_of(_GUIDANCE)
    config["time_cond_proj_dim"] = None if guidance is None else guidance.shape[1]
    return _filled(lambda: UNet2DConditionModel.from_config(config), weight_of, "UNet", dtype)


def _load_vae(base: str, find: Find) -> AutoencoderKL:
    config: Any = AutoencoderKL.load_config(base, subfolder="vae")
    num_blocks = len(config["block_out_channels"])

    def weight_of(name: str) -> Tensor | None:
        for prefix in VAE_PREFIXES:
            weight = find(prefix + original_vae_name(name, num_blocks))
            weight = find(prefix + name) if weight is None else weight
            if weight is not None:
                return weight.flatten(1) if is_vae_matrix(name) else weight
        return None

    return _filled(lambda: AutoencoderKL.from_config(config), weight_of, "VAE", torch.float32)


def _load_text_encoder(name: str, base: str, find: Find, kind: FileKind) -> nn.Module:
    config = CLIPTextConfig.from_pretrained(base, subfolder=name)
    has_projection = "CLIPTextModelWithProjection" in (config.architectures or [])
    cls = CLIPTextModelWithProjection if has_projection else CLIPTextModel

    def weight_of(weight_name: str) -> Tensor | None:
        whole = whole_name(weight_name)
        if name == "text_encoder":
            for prefix in CLIP_PREFIXES:
                for spelt in (whole, whole.removeprefix("text_model.")):  # the oldest files leave a level out
                    weight = find(prefix + spelt)
                    if weight is not None:
                        return weight
        return _from_openclip(whole, find, OPENCLIP_PREFIXES[name == "text_encoder_2"])

    return _filled(lambda: cls(config), weight_of, name, torch.float32).eval()


def whole_name(name: str) -> str:
    """Returns the name of a text encoder's weight with the level that transformers 5.6 took out of CLIPTextModel."""
    return name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"


def _from_openclip(name: str, find: Find, prefix: str) -> Tensor | None:
    spelt, third = openclip_name(name)
    weight = find(prefix + spelt)
    if weight is None or third is None:
        return weight.T if weight is not None and spelt == "text_projection" else weight
    return weight.chunk(3)[third]


def _filled(build: Callable[[], Any], weight_of: Find, part: str, dtype: torch.dtype) -> Any:
    """Builds a module without memory and gives it its weights."""
    with torch.device("meta"):
        module = build()
    weights, missing = {}, []
    for name, empty in module.state_dict().items():
        weight = weight_of(name)
        if weight is None:
            missing.append(name)
        elif weight.shape != empty.shape:
            raise ValueError(f"its {part} has {name} of shape {list(weight.shape)}, and not {list(empty.shape)}")
        else:
            weights[name] = weight.to(dtype).clone(memory_format=torch.contiguous_format)
    if missing:
        raise ValueError(
            f"its {part} lacks {len(missing)} of {len(missing) + len(weights)} weights, such as {missing[0]}"
        )
    module.load_state_dict(weights, assign=True)
    # Buffers that no file has, such as position ids, are made anew.
    fresh = {name: tensor for name, tensor in module.named_buffers() if tensor.is_meta}
    if fresh:
        whole = build()
        for name in fresh:
            place, _, last = name.rpartition(".")
            module.get_submodule(place).register_buffer(last, whole.get_buffer(name), persistent=False)
    check_finite(part, module)
    return module.eval()


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


def unet_tensors(unet: Any, guidance_scale: float) -> dict[str, Tensor]:
    """Returns the weights of a UNet by their names in a file; see the module's text for a guidance input."""
    names, weights = UNetNames(unet.config), dict(unet.state_dict())
    found: dict[str, Tensor] = {}
    if _GUIDANCE in weights:
        found |= {OWN + _GUIDANCE: weights.pop(_GUIDANCE), OWN + _BIAS: weights[_BIAS]}
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
