"""The names that ComfyUI, A1111 and their files give to the layers of a UNet: those of CompVis' and Stability's code.

    down_blocks.0.attentions.1.proj_in         -> input_blocks.2.1.proj_in
    up_blocks.1.resnets.0.time_emb_proj.weight -> output_blocks.3.0.emb_layers.1.weight

The original code counts the blocks of each half in one list, and diffusers nests them; `tests/backbones` holds the
result against diffusers' converter, which goes the other way, and against the lists of names in tests/backbones/names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_AROUND_THE_BLOCKS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


class UNetNames:
    """The original names of one UNet's layers and weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._places = {**_AROUND_THE_BLOCKS, **_MIDDLE, **_down_places(config), **_up_places(config)}

    def original(self, name: str) -> str | None:
        """Returns the original name of a layer or weight; None if the original UNet has no such layer.

        Only `time_embedding.cond_proj`, the guidance input of a latent consistency model, has none.
        """
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            place = self._places.get(".".join(parts[:length]))
            if place is not None:
                return ".".join([place, *_inside(parts[:length], parts[length:])])
        return None


def _inside(place: list[str], rest: list[str]) -> list[str]:
    """Renames what follows the place of a block; only residual blocks have other names inside."""
    if "resnets" in place and rest:
        return [_RESNET[rest[0]], *rest[1:]]
    return rest


def _down_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Numbers the first half: block 0 is conv_in; each layer and each downsampler is one more."""
    places, number = {}, 0
    kinds = config["down_block_types"]
    for block, kind in enumerate(kinds):
        for layer in range(_num_layers(config, block)):
            number += 1
            places[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            if _has_attention(kind):
                places[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
        if block < len(kinds) - 1:
            number += 1
            places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
    return places


def _up_places(config: Mapping[str, Any]) -> dict[str, str]:
    """Numbers the second half: each layer is one; an upsampler stands last in the layer that it follows."""
    places, number = {}, -1
    kinds = config["up_block_types"]
    for block, kind in enumerate(kinds):
        for layer in range(_num_layers(config, len(kinds) - 1 - block) + 1):
            number += 1
            places[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            if _has_attention(kind):
                places[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
        if block < len(kinds) - 1:
            places[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number}.{1 + _has_attention(kind)}.conv"
    return places


def _num_layers(config: Mapping[str, Any], block: int) -> int:
    """Returns the layers of a block of the first half."""
    layers = config["layers_per_block"]
    return layers if isinstance(layers, int) else layers[block]


def _has_attention(kind: str) -> bool:
    return kind.startswith("CrossAttn")


def original_vae_name(name: str, num_blocks: int) -> str:
    """Returns the original name of a weight of an AutoencoderKL whose halves have `num_blocks` blocks each.

    The original counts the decoder's blocks from the image inwards, and diffusers in the order of use.
    """
    half, _, rest = name.partition(".")
    if half in ("quant_conv", "post_quant_conv"):
        return name
    parts = rest.split(".")
    if parts[0] in ("down_blocks", "up_blocks"):
        is_up = parts[0] == "up_blocks"
        place = f"up.{num_blocks - 1 - int(parts[1])}" if is_up else f"down.{parts[1]}"
        if parts[2] == "resnets":
            return f"{half}.{place}.block.{parts[3]}.{_vae_layer(parts[4])}.{parts[5]}"
        return f"{half}.{place}.{'upsample' if is_up else 'downsample'}.conv.{parts[5]}"
    if parts[0] == "mid_block" and parts[1] == "resnets":
        return f"{half}.mid.block_{int(parts[2]) + 1}.{_vae_layer(parts[3])}.{parts[4]}"
    if parts[0] == "mid_block":
        return f"{half}.mid.attn_1.{_VAE_ATTENTION['.'.join(parts[3:-1])]}.{parts[-1]}"
    return f"{half}.{rest.replace('conv_norm_out', 'norm_out')}"


def is_vae_matrix(name: str) -> bool:
    """Tells whether the original has a convolution of one pixel, (O, I, 1, 1), where diffusers has a matrix (O, I)."""
    return "mid_block.attentions" in name and name.endswith("weight") and "group_norm" not in name


def openclip_name(name: str) -> tuple[str, int | None]:
    """Returns OpenCLIP's name of a CLIP text encoder's weight, and which third of it the weight is.

    name: that of transformers, with `text_model.` in front of all but text_projection. OpenCLIP has one tensor for
    queries, keys and values (thirds 0, 1, 2; None for whole tensors), and its text_projection is transposed.
    """
    place = name.removeprefix("text_model.")
    if place in _OPENCLIP_AROUND:
        return _OPENCLIP_AROUND[place], None
    _, _, number, layer, *inside = place.split(".")
    block = f"transformer.resblocks.{number}"
    if layer == "self_attn" and inside[0] in _THIRDS:
        return f"{block}.attn.in_proj_{inside[1]}", _THIRDS.index(inside[0])
    if layer == "self_attn":
        return f"{block}.attn.out_proj.{inside[1]}", None
    return f"{block}.{_OPENCLIP_LAYERS['.'.join([layer, *inside[:-1]])]}.{inside[-1]}", None


_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_THIRDS = ("q_proj", "k_proj", "v_proj")
_OPENCLIP_AROUND = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
    "text_projection.weight": "text_projection",
}
_OPENCLIP_LAYERS = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def _vae_layer(name: str) -> str:
    return "nin_shortcut" if name == "conv_shortcut" else name
