"""A diffusers pipeline as the parts that training needs: UNet, text encoding, image decoding, export.

folder or hub id -> Backbone;   prompts -> Conditioning (encoded once each);   latents -> images;   weights -> folder
"""

# B images, D distinct prompts, L tokens, E embedding, C H W latent

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from torch import Tensor
from transformers.utils import logging as transformers_logging

from rlcm_fast.backbones.loading import resolve_model_path
from rlcm_fast.trajectory import Conditioning, Prompt


class Backbone:
    """A loaded text-to-image pipeline; everything but the UNet is frozen and stays out of DeepSpeed's hands."""

    def __init__(self, pipeline: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._pipeline = pipeline
        self.device = device
        self.dtype = dtype
        self._encodings: dict[str, Tensor] = {}  # text -> (L, E), on the device

    @classmethod
    def load(cls, path: str, revision: str | None, device: torch.device, dtype: torch.dtype) -> Backbone:
        """From a shipped model's name, a diffusers folder or a hub id; `dtype` is the UNet's, the rest is float32.

        Raises:
            ValueError: nothing loads from there, or it has no UNet2DConditionModel.
        """
        _silence_loading()
        try:
            pipeline: Any = DiffusionPipeline.from_pretrained(
                resolve_model_path(path),
                revision=revision,
                dtype={"unet": dtype, "default": torch.float32},
                safety_checker=None,
            )
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"model.path={path} could not be loaded: {reason}; check the name") from error
        if not isinstance(getattr(pipeline, "unet", None), UNet2DConditionModel):
            raise ValueError(f"model.path={path} has no UNet2DConditionModel; give a Stable Diffusion or LCM folder")
        pipeline.to(device)
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            part.requires_grad_(False)
        pipeline.unet.requires_grad_(True)
        pipeline.unet.eval()  # dropout would make the ratio differ from 1
        return cls(pipeline, device, dtype)

    @property
    def unet(self) -> UNet2DConditionModel:
        return self._pipeline.unet

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        return self._pipeline.scheduler.config

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], with_negative: bool) -> Conditioning:
        """The conditioning of B samples; each distinct text is encoded once in the life of the run."""
        distinct = list(dict.fromkeys(prompt.text for prompt in prompts))
        self._encode_missing([*distinct, ""] if with_negative else distinct)
        rows = {text: row for row, text in enumerate(distinct)}
        return Conditioning(
            prompt_embeds=torch.stack([self._encodings[text] for text in distinct]),
            index=torch.tensor([rows[prompt.text] for prompt in prompts], device=self.device),
            negative_embeds=self._encodings[""][None] if with_negative else None,
        )

    def _encode_missing(self, texts: list[str]) -> None:
        """One by one: in a batch the last bits depend on the company, which a resumed run meets in another order."""
        for text in texts:
            if text not in self._encodings:
                embeds, _ = self._pipeline.encode_prompt([text], self.device, 1, False)  # (1, L, E)
                self._encodings[text] = embeds[0]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) float32 in [0, 1] of x_0 latents (B, C, H, W), as diffusers' pipelines decode them."""
        vae = self._pipeline.vae
        images = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        return (images / 2 + 0.5).clamp(0, 1).float()

    def export(self, unet_weights: Mapping[str, Tensor], folder: Path) -> None:
        """Writes a diffusers folder with these UNet weights, which stock diffusers loads."""
        unet = UNet2DConditionModel.from_config(self.unet.config)
        assert isinstance(unet, UNet2DConditionModel)
        unet.load_state_dict(dict(unet_weights))
        components = {**self._pipeline.components, "unet": unet}
        type(self._pipeline)(**components, requires_safety_checker=False).save_pretrained(folder)


def _silence_loading() -> None:
    """diffusers and transformers tell much while loading that no user can act on; errors are still raised."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
