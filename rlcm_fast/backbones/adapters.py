"""LoRA adapters (arXiv 2106.09685) in a UNet, by peft: y = W x + (alpha / rank) B A x; only A and B are trained.

A and B are float32, whatever the dtype of the UNet. B starts at zero, so training starts exactly at the model itself.
The start model stays available: it is the same network with its adapters switched off.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlcm_fast.backbones.lora_layouts import KOHYA_FILE, LoraLayer, write_kohya
from rlcm_fast.config import LoraConfig
from rlcm_fast.file_modes import share

_NAME = "default"  # peft's name for the only adapter


def add_adapters(unet: UNet2DConditionModel, config: LoraConfig) -> None:
    """Freeze the UNet and add trainable float32 adapters; torch's global generator draws A."""
    for target in config.targets:
        layers = [m for name, m in unet.named_modules() if f".{name}".endswith(f".{target}")]
        if not layers or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in layers):
            raise ValueError(
                f"lora.targets names {target}, which is {'no layer' if layers else 'nothing'} of this UNet that can"
                " have adapters; give the end of the name of a linear or convolution layer, such as to_q or to_out.0"
            )
    unet.requires_grad_(False)
    unet.add_adapter(_peft_config(config))
    cast_training_params(unet, torch.float32)


def merged(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A UNet of the same config with these weights; adapters, if there are any, are merged into the other weights."""
    whole = UNet2DConditionModel.from_config(unet.config)
    assert isinstance(whole, UNet2DConditionModel)
    if has_adapters(unet):
        whole.add_adapter(unet.peft_config[_NAME])
    whole.load_state_dict(dict(weights))
    if has_adapters(unet):
        whole.fuse_lora()
        whole.unload_lora()
    return whole


def plain(unet: UNet2DConditionModel, weights: Mapping[str, Tensor]) -> UNet2DConditionModel:
    """A UNet of the same config, without adapters, with these weights."""
    whole = UNet2DConditionModel.from_config(unet.config)
    assert isinstance(whole, UNet2DConditionModel)
    whole.load_state_dict(dict(weights))
    return whole


def save_adapters(unet: UNet2DConditionModel, weights: Mapping[str, Tensor], pipeline: Any, folder: Path) -> None:
    """Save the adapters among `weights` as two files: for `load_lora_weights` of the pipeline, and for ComfyUI, A1111.

    The second is kohya's layout, with the alpha that the adapters were trained with.
    """
    config = unet.peft_config[_NAME]
    tensors = get_peft_model_state_dict(unet, state_dict=dict(weights), adapter_name=_NAME)
    pipeline.save_lora_weights(folder, unet_lora_layers=tensors, unet_lora_adapter_metadata=config.to_dict())
    write_kohya(folder / KOHYA_FILE, _layers_of(tensors, float(config.lora_alpha)), unet.config)
    share(folder)


def _layers_of(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, LoraLayer]:
    """The layers of PEFT's tensors, on the CPU."""
    kept = {name: weight.detach().cpu() for name, weight in tensors.items()}
    names = [name.removesuffix(".lora_A.weight") for name in kept if name.endswith(".lora_A.weight")]
    return {name: LoraLayer(kept[f"{name}.lora_A.weight"], kept[f"{name}.lora_B.weight"], alpha) for name in names}


def has_adapters(unet: UNet2DConditionModel) -> bool:
    return any(".lora_" in name for name, _ in unet.named_parameters())


def adapters_are_on(unet: nn.Module) -> bool:
    """Tells whether a pass of the network uses its adapters, if it has any."""
    layers = (module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    return not any(layer.disable_adapters for layer in layers)


class WithoutAdapters:
    """Network that runs without its adapters: the start model, which needs no second copy of the weights."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet = unet

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self._unet.disable_adapters()
        try:
            return self._unet(*arguments, **keywords)
        finally:
            self._unet.enable_adapters()


def _peft_config(config: LoraConfig) -> PeftConfig:
    return PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(config.targets))  # pyright: ignore[reportArgumentType]
