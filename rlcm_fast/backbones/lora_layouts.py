"""LoRA files: reads those of kohya, PEFT and diffusers, adds them to weights, and writes kohya's for ComfyUI and A1111.

    kohya      lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
    PEFT       unet.down_blocks.0.attentions.0.proj_in.lora_A.weight, .lora_B.weight; alpha in the file's metadata
    diffusers  unet.down_blocks.0.attentions.0.proj_in.lora.down.weight, .lora.up.weight, and older spellings

All of them say W + (alpha / rank) * up @ down. A name with its dots turned into underscores cannot be read back, so the
names of all layers of the model are spelt in every layout first, and the names of the file are looked up in them.
"""

# I inputs, O outputs, R rank of a layer

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rlcm_fast.backbones.original_names import UNetNames
from rlcm_fast.file_modes import share
from rlcm_fast.finite_json import is_number, load_json

KOHYA_FILE = "kohya.safetensors"

_DOWN = (".lora_down.weight", ".lora_A.weight", ".lora_A.default.weight", ".lora.down.weight", "_lora.down.weight")
_UP = (".lora_up.weight", ".lora_B.weight", ".lora_B.default.weight", ".lora.up.weight", "_lora.up.weight")
_OLD_DOWN, _OLD_UP = ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"
_ROLES = {**dict.fromkeys((*_DOWN, _OLD_DOWN), "down"), **dict.fromkeys((*_UP, _OLD_UP), "up"), ".alpha": "alpha"}
_OTHER_KINDS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a Tucker decomposition",
    "oft_": "OFT",
    "on_input": "(IA)^3",
    "w_norm": "a LoRA of norms",
}
_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's config
_REPEATS = re.compile(r"[+?{]|\)\*")  # .* is no repetition of parts
_MOST_STARS = 3
_OLD_ATTENTION = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}


@dataclass(frozen=True)
class LoraLayer:
    """What a LoRA adds to one linear or convolution layer: alpha / rank * up @ down."""

    down: Tensor  # (R, I), or (R, I, h, w) of a convolution
    up: Tensor  # (O, R), or (O, R, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def to(self, dtype: torch.dtype) -> LoraLayer:
        return LoraLayer(self.down.to(dtype), self.up.to(dtype), self.alpha)

    def delta(self, shape: torch.Size) -> Tensor:
        """Returns what is added to a weight of this shape, float32 on the CPU; raises ValueError if it does not fit."""
        up, down = self.up.float().flatten(1), self.down.float().flatten(1)
        if up.shape[1] != down.shape[0] or len(up) * down.shape[1] != math.prod(shape) or len(up) != shape[0]:
            found = f"{list(self.up.shape)} x {list(self.down.shape)}"
            raise ValueError(f"its matrices {found} do not fit a weight of shape {list(shape)}")
        return (up @ down).reshape(shape) * (self.alpha / self.rank)


@dataclass(frozen=True)
class Lora:
    """A file's layers, by part of the pipeline (unet, text_encoder, text_encoder_2) and the layer's name in it."""

    layers: dict[tuple[str, str], LoraLayer]
    unmatched: tuple[str, ...]  # what the file calls layers that the model does not have

    @property
    def summary(self) -> str:
        """Says how many layers were matched, in words for a line."""
        parts = [part for part, _ in self.layers]
        counts = ", ".join(f"{parts.count(part)} of {part}" for part in dict.fromkeys(parts))
        rest = f"; {len(self.unmatched)} unmatched, such as {self.unmatched[0]}" if self.unmatched else ""
        return f"{len(parts)} of {len(parts) + len(self.unmatched)} layers matched ({counts}){rest}"


def read_lora(file: Path, networks: Mapping[str, nn.Module]) -> Lora:
    """Reads a .safetensors file for the networks of a pipeline, by the pipeline's names for them.

    Raises:
        ValueError: it is not a LoRA, one of another kind (LoHa, LoKr, ...), or has no layer of the UNet.
    """
    # Collect the tensors of each layer.
    with safe_open(file, framework="pt") as content:
        tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
        metadata = content.metadata() or {}
    _refuse_other_kinds(tensors)
    found: dict[str, dict[str, Tensor]] = {}
    rest: list[str] = []
    for key, tensor in tensors.items():
        suffix = next((suffix for suffix in _ROLES if key.endswith(suffix)), None)
        if suffix is None:
            rest.append(key)
        else:
            found.setdefault(key.removesuffix(suffix), {})[_ROLES[suffix]] = tensor

    # Find the layers in the model.
    names, alphas = _spellings(networks), _Alphas(file, metadata)
    layers: dict[tuple[str, str], LoraLayer] = {}
    for spelling, parts in found.items():
        layer = names.get(spelling)
        if layer is None or not {"down", "up"} <= parts.keys():
            rest.append(spelling)
            continue
        rank = _rank(parts, spelling)
        alpha = parts["alpha"].item() if "alpha" in parts else alphas.of(*layer, rank)
        layers[layer] = LoraLayer(parts["down"], parts["up"], alpha)
    if not any(part == "unet" for part, _ in layers):
        example = f", whose first name is {rest[0]}" if rest else ""
        raise ValueError(f"none of its layers is one of this model's UNet{example}")
    return Lora(layers, tuple(rest))


def _rank(parts: Mapping[str, Tensor], named: str) -> int:
    """Returns the rank of a layer; raises ValueError if its tensors are no matrices, or its alpha no number."""
    if parts["down"].ndim < 2 or parts["up"].ndim < 2 or not len(parts["down"]):
        raise ValueError(f"{named} has tensors of shapes {[list(tensor.shape) for tensor in parts.values()]}")
    if "alpha" in parts and parts["alpha"].numel() != 1:
        raise ValueError(f"{named} has {parts['alpha'].numel()} alphas")
    return len(parts["down"])


@torch.no_grad()
def add_lora(lora: Lora, networks: Mapping[str, nn.Module], scale: float = 1.0) -> None:
    """Adds a LoRA to the weights in place, summed in float32.

    Raises:
        ValueError: a matrix does not fit its layer; no weight has changed then.
    """
    weights: dict[Any, Any] = {key: networks[key[0]].get_submodule(key[1]).weight for key in lora.layers}
    for key, layer in lora.layers.items():
        try:
            _check(layer, weights[key].shape)
        except ValueError as error:
            raise ValueError(f"{'.'.join(key)}: {error}") from error
    for key, layer in lora.layers.items():
        weight = weights[key]
        delta = layer.delta(weight.shape).to(weight.device)
        weight.copy_(weight.float() + (delta if scale == 1 else delta * scale))


def write_kohya(file: Path, layers: Mapping[str, LoraLayer], unet_config: Mapping[str, Any], **metadata: str) -> None:
    """Writes the layers of a UNet, by name, as ComfyUI, A1111 and kohya's scripts expect them.

    The alpha of a layer is the one it was trained with, so every tool applies alpha / rank.
    """
    tensors = {}
    for name, layer in layers.items():
        key = kohya_name(name, unet_config)
        tensors[f"{key}.lora_down.weight"] = layer.down.contiguous()
        tensors[f"{key}.lora_up.weight"] = layer.up.contiguous()
        tensors[f"{key}.alpha"] = torch.tensor(layer.alpha, dtype=layer.down.dtype)
    save_file(tensors, file, {"format": "pt", **_kohya_metadata(layers, unet_config), **metadata})
    share(file)


def kohya_name(name: str, unet_config: Mapping[str, Any]) -> str:
    """Returns the name of a UNet's layer in kohya's files: diffusers' for Stable Diffusion, the original for SDXL."""
    original = UNetNames(unet_config).original(name) if is_sdxl(unet_config) else None
    return f"lora_unet_{(original or name).replace('.', '_')}"


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    return unet_config.get("addition_embed_type") == "text_time"


class _Alphas:
    """The alphas of a file that has no tensors for them: in PEFT's config, and otherwise the rank itself."""

    def __init__(self, file: Path, metadata: Mapping[str, str]) -> None:
        beside = file.parent / "adapter_config.json"
        self._config = _object(metadata.get(_METADATA, "{}"), _METADATA)
        if not self._config and beside.is_file():
            own = _object(beside.read_bytes(), beside.name)
            self._config = {f"unet.{name}": value for name, value in own.items()}

    def of(self, part: str, layer: str, rank: int) -> float:
        """Returns the alpha of a layer; raises ValueError if the config says what no LoRA has."""
        config = self._config
        alpha, patterns = config.get(f"{part}.lora_alpha", rank), config.get(f"{part}.alpha_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError(f"its alpha_pattern is {patterns}, and no object of alphas by layer")
        for pattern, value in patterns.items():
            if _compiled(pattern).fullmatch(layer):
                alpha = value
        if not is_number(alpha):
            raise ValueError(f"its alpha of {part}.{layer} is {alpha}, and no number")
        # PEFT's rank-stabilised LoRA divides by the root of the rank.
        return float(alpha) * (math.sqrt(rank) if config.get(f"{part}.use_rslora") else 1)


def _object(text: str | bytes, named: str) -> dict[str, Any]:
    try:
        found = load_json(text)
    except ValueError as error:
        raise ValueError(f"its {named} {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"its {named} holds no JSON object")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns a pattern of layers; raises ValueError for one with repetitions, whose search may take years."""
    if _REPEATS.search(pattern) or pattern.count("*") > _MOST_STARS:
        raise ValueError(f"its alpha_pattern {pattern[:60]} repeats parts, which is not read; name the layers in full")
    try:
        return re.compile(rf"(.*\.)?{pattern}")
    except re.error as error:
        raise ValueError(f"its alpha_pattern {pattern[:60]} is no pattern ({error})") from error


def _refuse_other_kinds(tensors: Mapping[str, Tensor]) -> None:
    for name in tensors:
        for mark, kind in _OTHER_KINDS.items():
            if mark in name:
                raise ValueError(f"it is {kind}, not a LoRA ({name}); merge it into a checkpoint with its own tool")


def _check(layer: LoraLayer, shape: torch.Size) -> None:
    """Raises ValueError unless the layer fits a weight of this shape; computes nothing."""
    LoraLayer(layer.down.to("meta"), layer.up.to("meta"), layer.alpha).delta(shape)


def _spellings(networks: Mapping[str, nn.Module]) -> dict[str, tuple[str, str]]:
    """Maps what any layout calls a layer to its part of the pipeline and its name there."""
    names: dict[str, tuple[str, str]] = {}
    for part, network in networks.items():
        spell = _unet_spellings(network) if part == "unet" else _text_spellings(part)
        for name, module in network.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                names |= dict.fromkeys(spell(name), (part, name))
    return names


def _unet_spellings(unet: Any) -> Any:
    table = UNetNames(unet.config)

    def spell(name: str) -> Iterator[str]:
        original = table.original(name)
        for spelt in [name] if original is None else [name, original]:
            yield from (spelt, f"unet.{spelt}", f"lora_unet_{spelt.replace('.', '_')}")
            yield from (f"base_model.model.{spelt}", f"diffusion_model.{spelt}")
        for attention in ("attn1", "attn2"):  # diffusers' oldest files name a layer of the processor
            old = name.replace(f".{attention}.", f".{attention}.processor.").removesuffix(".0")
            if old != name:
                yield from (old, f"unet.{old}")

    return spell


def _text_spellings(part: str) -> Any:
    prefixes = ("lora_te2_",) if part == "text_encoder_2" else ("lora_te_", "lora_te1_")

    def spell(name: str) -> Iterator[str]:
        # transformers 5.6 took a level out of CLIPTextModel; files have it.
        whole = name if name.startswith(("text_model.", "text_projection")) else f"text_model.{name}"
        yield from (f"{part}.{whole}", f"{part}.{name}")
        yield from (f"{prefix}{whole.replace('.', '_')}" for prefix in prefixes)
        start, _, last = whole.rpartition(".")
        if last in _OLD_ATTENTION:
            yield f"{part}.{start}.{_OLD_ATTENTION[last]}"

    return spell


def _kohya_metadata(layers: Mapping[str, LoraLayer], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the entries by which A1111 and InvokeAI tell the rank and the family of a LoRA."""
    width = unet_config.get("cross_attention_dim")
    family = "sd_v2" if width == 1024 else "sd_v1"
    first = next(iter(layers.values()))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(first.rank),
        "ss_network_alpha": f"{first.alpha:g}",
        "ss_base_model_version": "sdxl_base_v1-0" if is_sdxl(unet_config) else family,
        "ss_v2": str(width == 1024),
    }
