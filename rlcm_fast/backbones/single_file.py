"""Reads a checkpoint in one file, in the layout of CompVis' and Stability's code, which ComfyUI and A1111 write.

    model.safetensors [+ a pipeline for what it lacks] -> the parts of a diffusers pipeline

It goes by the names of the model's own weights (original_names.py), so a missing tensor is named, and what the model
has no use for (an average of the weights, position ids) is left alone. No network is used. What a latent consistency
model has beyond the layout lies where single_file_writing.py puts it.
"""

# O I rows and columns of a matrix

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from rlcm_fast.backbones.file_kinds import (
    CLIP_PREFIXES,
    LAYOUTS,
    OPENCLIP_PREFIXES,
    SCHEDULER,
    VAE_PREFIXES,
    FileKind,
    read_header,
)
from rlcm_fast.backbones.networks import check_finite
from rlcm_fast.backbones.original_names import UNetNames, is_vae_matrix, openclip_name, original_vae_name
from rlcm_fast.finite_json import load_json

OWN = "rlcm_fast.unet."  # what the original layout has no place for
GUIDANCE = "time_embedding.cond_proj.weight"

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

    try:
        config = load_json(text)
    except ValueError as error:
        raise ValueError(f"{kind.path} names a scheduler that {error}; download it again") from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    known: Any = getattr(diffusers, str(name), None)
    if not (isinstance(known, type) and issubclass(known, SchedulerMixin)):
        raise ValueError(f"{kind.path} names the scheduler {name}, which diffusers does not have; give another model")
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

    guidance = weight_of(GUIDANCE)
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
