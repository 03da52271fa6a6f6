"""A diffusers pipeline, split into the parts that training needs: UNet, text encoding, image decoding, export.

folder or hub id -> Backbone;   prompts -> Conditioning (each encoded once);   latents -> images;   weights -> folder
"""

# B images, D distinct prompts, C H W latent

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from rlcm_fast.backbones.adapters import (
    WithoutAdapters,
    adapters_are_on,
    add_adapters,
    has_adapters,
    merged,
    plain,
    save_adapters,
)
from rlcm_fast.backbones.assembly import assemble
from rlcm_fast.backbones.image_coder import ImageCoder, Judge
from rlcm_fast.backbones.model_checks import check_image_sizes
from rlcm_fast.backbones.text_checks import check_configs, check_pipeline
from rlcm_fast.backbones.texts import Encoding, TextEncoder, TextSettings
from rlcm_fast.config import LoraConfig, ModelConfig, PromptsConfig
from rlcm_fast.file_modes import share
from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.graphs import Graphs
from rlcm_fast.trajectory import Conditioning, Prompt

_ENCODING_BYTES = 256 * 2**20  # limit for the text encodings that are kept


class Backbone:
    """A loaded text-to-image pipeline; all parts but the UNet are frozen and never managed by DeepSpeed."""

    def __init__(
        self, pipeline: Any, coder: ImageCoder, texts: TextEncoder, dtype: torch.dtype, offload_idle: bool
    ) -> None:
        self._pipeline, self._coder, self.texts = pipeline, coder, texts
        self.device = device = coder.device
        self.dtype = dtype
        self._encodings: dict[str, Encoding] = {}
        self._negative: Encoding | None = None
        self.notes: tuple[str, ...] = ()  # what was found while loading, for people
        self._is_sdxl = "text_encoder_2" in pipeline.components
        self._encoders = [FrozenNetwork(encoder, device) for encoder in self.text_encoders]
        if not offload_idle:
            for encoder in self._encoders:
                encoder.to_device()
        self._offloads = offload_idle and device.type != "cpu"

    @classmethod
    def load(
        cls,
        model: ModelConfig,
        device: torch.device,
        dtype: torch.dtype,
        kind: str,
        offload_idle: bool = False,
        decode_batch_size: int = 0,
        prompts: PromptsConfig | None = None,
    ) -> Backbone:
        """Load what `model` names, the UNet in `dtype` and the rest in float32; raises ValueError as `assemble` does.

        kind: of the policy; it says the scheduler if there is a `model.base` or a `model.lora`.
        offload_idle: only the UNet stays on the device. decode_batch_size: images decoded at once; 0 means all.
        prompts: the negative prompt, and how long prompts are read.
        """
        settings = TextSettings(model.clip_skip, prompts or PromptsConfig())
        check_configs(model, settings)

        # Load the parts; only the UNet is trained, and the others are on the device only where they work.
        notes: list[str] = []
        pipeline = assemble(model, dtype, kind, notes)
        vae_dtype = _vae_dtype(model, pipeline, device)
        check_pipeline(pipeline, settings)
        coder = ImageCoder(pipeline.vae, device, vae_dtype, offload_idle, decode_batch_size)
        backbone = cls(pipeline, coder, TextEncoder(pipeline, device, settings), dtype, offload_idle)
        backbone.notes = tuple(notes)
        backbone._set_image_size(model)
        backbone._pipeline.unet.to(device)
        for part in backbone.frozen_parts:
            part.requires_grad_(False)
        backbone.unet.requires_grad_(True)
        backbone.unet.eval()  # because dropout would make the ratio differ from 1
        return backbone

    def _set_image_size(self, model: ModelConfig) -> None:
        """Set the size in the config of the UNet, which policies, SDXL's time ids and exports read, to the first one.

        Raises ValueError for a size that the UNet cannot halve.
        """
        # Check all sizes.
        unet: Any = self.unet.config
        check_image_sizes(model, self._pipeline.vae_scale_factor, unet)

        # Set the first one; None keeps the model's.
        if model.pixels is not None:
            height, width = self._latent_size(model.pixels)
            self.unet.register_to_config(sample_size=height if height == width else [height, width])

    def _latent_size(self, pixels: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latents of an image of so many pixels."""
        height, width = (side // self._pipeline.vae_scale_factor for side in pixels)
        return height, width

    def add_adapters(self, config: LoraConfig) -> None:
        """Add LoRA adapters to the UNet; from here on, only these are trained."""
        add_adapters(self.unet, config)

    @property
    def moves_parts(self) -> bool:
        """Whether the VAE and the text encoders are on the device only while they work."""
        return self._offloads

    @property
    def has_adapters(self) -> bool:
        """Whether LoRA adapters are trained instead of the weights of the UNet."""
        return has_adapters(self.unet)

    @property
    def adapters_are_on(self) -> bool:
        """Whether a pass of the UNet uses its adapters, if it has any."""
        return adapters_are_on(self.unet)

    def frozen_start(self) -> Callable[..., Any]:
        """Network as it is now, called like the UNet; if there are adapters, it shares the weights of the UNet."""
        if self.has_adapters:
            return WithoutAdapters(self.unet)
        return copy.deepcopy(self.unet).requires_grad_(False)

    def start_unet(self) -> UNet2DConditionModel:
        """The UNet without adapters, if none of its own weights were trained or replaced since it was loaded."""
        own = {name: weight for name, weight in self.unet.state_dict().items() if ".lora_" not in name}
        return plain(self.unet, {name.replace(".base_layer.", "."): weight for name, weight in own.items()})

    @property
    def unet(self) -> UNet2DConditionModel:
        return self._pipeline.unet

    @property
    def text_encoders(self) -> list[torch.nn.Module]:
        """The text encoder, or SDXL's two text encoders."""
        names = ("text_encoder", "text_encoder_2") if self._is_sdxl else ("text_encoder",)
        return [self._pipeline.components[name] for name in names]

    @property
    def frozen_parts(self) -> list[torch.nn.Module]:
        """Parts that are never trained: the VAE and the text encoders."""
        return [self._pipeline.vae, *self.text_encoders]

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Config of the scheduler, with its class as `_class_name`."""
        scheduler = self._pipeline.scheduler
        return {**scheduler.config, "_class_name": type(scheduler).__name__}

    @torch.no_grad()
    def encode(self, prompts: Sequence[Prompt], with_negative: bool, remember: bool = True) -> Conditioning:
        """Conditioning of B samples; each distinct text is encoded once and kept while there is room.

        Without `remember`, the texts are encoded together and forgotten, which captions of millions of images need, and
        the negative is the empty text, whatever the negative prompt is: it stands for captions that are dropped.
        """
        # Encode the distinct texts, or look them up.
        distinct = list(dict.fromkeys(prompt.text for prompt in prompts))
        negative: Encoding | None = None
        if remember:
            self._encode_missing(distinct, with_negative)
            encodings = [self._encodings[text] for text in distinct]
            negative = self._negative if with_negative else None
        else:
            with self._encoding():
                encodings = self.texts.encode(distinct)
                negative = self.texts.empty() if with_negative else None
        self._forget_oldest()

        # Bundle them for the samples.
        rows = {text: row for row, text in enumerate(distinct)}
        embeds, pooled = self.texts.stacked(encodings)
        negative_embeds, negative_pooled = self.texts.stacked([negative]) if negative else (None, None)
        return Conditioning(
            prompt_embeds=embeds,
            index=torch.tensor([rows[prompt.text] for prompt in prompts], device=self.device),
            negative_embeds=negative_embeds,
            pooled_embeds=pooled,
            negative_pooled=negative_pooled,
            time_ids=self._time_ids(self.image_size) if self._is_sdxl else None,
        )

    def sized(self, conditioning: Conditioning, pixels: tuple[int, int]) -> Conditioning:
        """The same conditioning for images of another height and width."""
        time_ids = self._time_ids(pixels) if self._is_sdxl else None
        return replace(conditioning, time_ids=time_ids, latent_size=self._latent_size(pixels))

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """The text encoders are on the device inside; with offload_idle only there."""
        with ExitStack() as stack:
            for encoder in self._encoders if self._offloads else ():
                stack.enter_context(encoder.in_use())
            yield

    def _forget_oldest(self) -> None:
        """Forget the oldest encodings (0.2 MB each for Stable Diffusion): few of millions of prompts ever return."""
        kept = sum(encoding.embeds.nbytes for encoding in self._encodings.values())
        while kept > _ENCODING_BYTES:
            kept -= self._encodings.pop(next(iter(self._encodings))).embeds.nbytes

    def _encode_missing(self, texts: list[str], with_negative: bool) -> None:
        """Encode new texts one by one: the last bits depend on the batch, and a resumed run forms other batches."""
        missing = [text for text in texts if text not in self._encodings]
        lacks_negative = with_negative and self._negative is None
        if not (missing or lacks_negative):
            return
        with self._encoding():
            for text in missing:
                (self._encodings[text],) = self.texts.encode([text])
            if lacks_negative:
                self._negative = self.texts.negative()

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels, the first of several sizes."""
        size = self.unet.config.sample_size  # pyright: ignore[reportAttributeAccessIssue]
        height, width = (size, size) if isinstance(size, int) else size
        return height * self._pipeline.vae_scale_factor, width * self._pipeline.vae_scale_factor

    def _time_ids(self, pixels: tuple[int, int]) -> Tensor:
        """SDXL's size input (1, 6): the size of an image before cropping, no crop, and the size after cropping."""
        return torch.tensor([[*pixels, 0, 0, *pixels]], dtype=torch.float32, device=self.device)

    def use_graphs(self, graphs: Graphs) -> None:
        """From here on, graphs replay the VAE's decoder."""
        self._coder.graphs = graphs

    def tell(self, say: Callable[[str], None]) -> None:
        """From here on, `say` receives what is measured, for people."""
        self._coder.say = say

    def decoding(self) -> AbstractContextManager[None]:
        """The VAE's decoder is on the device inside, however often it decodes."""
        return self._coder.decoding()

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents x_0 (B, C, H, W) to images (B, 3, H, W) float32 in [0, 1], as diffusers' pipelines do."""
        return self._coder.decode(latents)

    @property
    def decoder_is_open(self) -> bool:
        """Whether the precision of the VAE's decoder is still to be tried."""
        return self._coder.is_open

    @property
    def decoder_precision(self) -> str:
        """The precision of the VAE's decoder, as torch names it."""
        return self._coder.precision

    def choose_decoder(self, latents: Sequence[Tensor], judge: Judge) -> None:
        """Try the decoder in float16 on micro-batches of latents x_0 (B, C, H, W), and keep it if the judge does."""
        self._coder.choose_precision(latents, judge)

    def set_decoder(self, in_half: bool) -> None:
        """From here on, the VAE decodes in float16, or in float32."""
        (self._coder.use_half if in_half else self._coder.use_single)()

    def set_decode_batch_size(self, size: int) -> None:
        """From here on, so many images are decoded at once; 0 means all."""
        self._coder.set_batch_size(size)

    def rehearse_decoding(self, latents: Tensor) -> None:
        """Decode latents x_0 (B, C, H, W) all at once and keep nothing."""
        self._coder.rehearse(latents)

    def encode_images(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents x_0 (B, C, h, w) float32, scaled as the UNet expects them."""
        return self._coder.encode(images, generator)

    def export(self, unet_weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write a diffusers folder with these UNet weights, which stock diffusers loads; adapters are merged in."""
        with self._coder.original():
            self.with_weights(unet_weights).save_pretrained(folder)
        share(folder)

    def with_weights(self, unet_weights: Mapping[str, Tensor]) -> Any:
        """The pipeline with a UNet of these weights, adapters merged in, in the place of its own."""
        pipeline = copy.copy(self._pipeline)
        pipeline.register_modules(unet=merged(self.unet, unet_weights))
        return pipeline

    def export_adapters(self, unet_weights: Mapping[str, Tensor], folder: Path) -> None:
        """Write the adapters alone, for `load_lora_weights` of a stock pipeline with the start model."""
        save_adapters(self.unet, unet_weights, self._pipeline, folder)


def _vae_dtype(model: ModelConfig, pipeline: Any, device: torch.device) -> str:
    """Returns the precision of the decoder, or auto if float16 is to be tried; SDXL's VAE says that it overflows."""
    is_large = "text_encoder_2" in pipeline.components and pipeline.vae.config.get("force_upcast", True)
    return "fp32" if model.vae_dtype == "auto" and (device.type != "cuda" or is_large) else model.vae_dtype
