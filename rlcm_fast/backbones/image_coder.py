"""A frozen VAE: its decoder makes images of latents, its encoder makes latents of real images.

Only the decoder is on the device; the encoder joins it when it is first used, and only real images use it. With
offload_idle each is there only while it works, and `decoding` keeps the decoder there over a whole rollout.

dtype=auto tries the decoder in float16, and keeps that if images stay finite, change by less than half a grey level on
average, and change little by whatever else a judge looks at. SDXL's own VAE overflows in float16;
madebyollin/sdxl-vae-fp16-fix does not. Without a trial of its own (`choose_precision`) the first latents are tried.
"""

# B images, C H W latent

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from torch import Tensor, nn

from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.graphs import Graphs, Work

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ENCODER_PARTS = ("encoder", "quant_conv")
_NUM_TRIED = 4  # images that both precisions decode, if nobody chooses them
_MOST_CHANGE = 0.5 / 255  # of pixels in [0, 1], on average


@dataclass(frozen=True)
class BothPrecisions:
    """The same latents, decoded in float32 and in float16."""

    single: Tensor  # (B, 3, H, W) float32 in [0, 1]
    half: Tensor  # (B, 3, H, W) float32 in [0, 1]; NaN where it has overflowed
    change: float  # of pixels on average, before images are clamped; NaN or infinite if float16 overflows

    @property
    def is_close(self) -> bool:
        """Tells whether pixels change by less than anybody sees."""
        return self.change < _MOST_CHANGE


@dataclass(frozen=True)
class Verdict:
    """Whether the decoder keeps float16, and why."""

    keeps_half: bool
    reason: str  # continues "the VAE decodes in float16" or "in float32", for people


Judge = Callable[[BothPrecisions], Verdict]


def by_pixels(both: BothPrecisions) -> Verdict:
    """Judges by how much pixels change."""
    changes = "which changes" if both.is_close else "because float16 would change"
    return Verdict(both.is_close, f"{changes} pixels by {both.change:.1e}")


class LatentScaling:
    """Maps a VAE's latents z to the x_0 of a UNet, as the pipelines of SDXL do: x_0 = (z - mean) factor / std.

    Without latents_mean and latents_std, mean is 0 and std is 1, as for Stable Diffusion; a folder of Stable Diffusion
    that has them is refused (config_checks.py), because its pipeline ignores them.
    """

    def __init__(self, vae_config: Mapping[str, Any], device: torch.device) -> None:
        self._factor: float = vae_config["scaling_factor"]
        mean, std = vae_config.get("latents_mean"), vae_config.get("latents_std")
        self._statistics: Tensor | None = None
        if mean is not None and std is not None:
            self._statistics = torch.tensor([mean, std], device=device)[:, None, :, None, None]  # (2, 1, C, 1, 1)

    def to_vae(self, latents: Tensor) -> Tensor:
        """Returns z for x_0, both (B, C, H, W)."""
        if self._statistics is None:
            return latents / self._factor
        mean, std = self._statistics.to(latents)
        return latents * std / self._factor + mean

    def to_unet(self, latents: Tensor) -> Tensor:
        """Returns x_0 for z, both (B, C, H, W)."""
        if self._statistics is None:
            return latents * self._factor
        mean, std = self._statistics.to(latents)
        return (latents - mean) * self._factor / std


class ImageCoder:
    """Decodes latents to images and encodes images to latents."""

    def __init__(
        self,
        vae: Any,
        device: torch.device,
        dtype: str = "fp32",
        offload_idle: bool = False,
        batch_size: int = 0,
    ) -> None:
        """vae: on the CPU in float32. batch_size: images decoded or encoded at once; 0 means all.

        dtype: of the decoder: fp32, fp16, bf16, or auto, which tries float16 with the first latents.
        """
        # Split the VAE, whose halves are seldom needed together.
        self._vae, self.device, self._batch_size = vae, device, batch_size
        self._scaling = LatentScaling(vae.config, device)
        parts = dict(vae.named_children())
        self._decoder_parts = nn.ModuleList([part for name, part in parts.items() if name not in _ENCODER_PARTS])
        self._encoder_parts = nn.ModuleList([part for name, part in parts.items() if name in _ENCODER_PARTS])

        # Place the decoder.
        self._offloads = offload_idle and device.type != "cpu"
        self.is_open = dtype == "auto"  # the precision is still to be tried
        self._dtype = _DTYPES.get(dtype, torch.float32)
        self._encoder = FrozenNetwork(self._encoder_parts, device)
        self._original = FrozenNetwork(self._decoder_parts, device)  # in float32; a copy of it stays on the CPU
        self._decoder = self._original if self._dtype == torch.float32 else self._converted(self._dtype)
        self._num_users = 0  # open blocks of `decoding`
        self._place_decoder()
        self.graphs: Graphs | None = None  # replays the decoder
        self.say: Callable[[str], None] = lambda line: None  # receives what was measured, for people

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """The decoder is on the device inside, however often it decodes; blocks may nest."""
        self._num_users += 1
        try:
            self._place_decoder()
            yield
        finally:
            self._num_users -= 1
            self._place_decoder()

    @contextmanager
    def original(self) -> Iterator[None]:
        """All of the VAE is in float32 on the CPU inside, as it was loaded."""
        self._encoder.to_cpu()
        self._original.to_cpu()
        yield
        self._decoder.to_cpu()  # in its own dtype again
        self._place_decoder()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents x_0 (B, C, H, W) to images (B, 3, H, W) float32 in [0, 1], as diffusers' pipelines do."""
        if self.is_open:
            self.choose_precision([latents[:_NUM_TRIED]])
        return _images(self._decoded(latents))

    @torch.no_grad()
    def choose_precision(self, latents: Sequence[Tensor], judge: Judge = by_pixels) -> None:
        """Decode micro-batches of latents x_0 (B, C, H, W) in float32 and in float16; keep what the judge chooses."""
        # Decode with both, and record no graphs of what may not be kept.
        self.is_open = False
        graphs, self.graphs = self.graphs, None
        with self.decoding():
            single = torch.cat([self._decoded(part) for part in latents])
        self.use_half()
        with self.decoding():
            half = torch.cat([self._decoded(part).float() for part in latents])
        self.graphs = graphs

        # Choose.
        change = ((half - single).abs().mean() / 2).item()
        verdict = judge(BothPrecisions(_images(single), _images(half), change))
        if not verdict.keeps_half:
            self.use_single()
        self.say(f"model.vae_dtype=auto: the VAE decodes in {self.precision}, {verdict.reason}")

    @property
    def precision(self) -> str:
        """The precision of the decoder, as torch names it."""
        return str(self._dtype).removeprefix("torch.")

    def use_half(self) -> None:
        """Decode in float16 from here on; trying it is over."""
        self.is_open = False
        self._dtype, self._decoder = torch.float16, self._converted(torch.float16)
        self._place_decoder()

    def use_single(self) -> None:
        """Decode in float32 from here on; trying float16 is over."""
        self.is_open = False
        self._dtype, self._decoder = torch.float32, self._original
        self._original.to_cpu()
        self._place_decoder()

    def set_batch_size(self, batch_size: int) -> None:
        """From here on, so many images are decoded or encoded at once; 0 means all."""
        self._batch_size = batch_size

    @torch.no_grad()
    def rehearse(self, latents: Tensor) -> None:
        """Decode latents (B, C, H, W) all at once and keep nothing: neither images nor the choice of a precision."""
        with self.decoding():
            self._run_decoder(self._scaling.to_vae(latents).to(self._dtype))

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images (B, 3, H, W) in [0, 1] to latents x_0 (B, C, h, w) float32, scaled as the UNet expects them.

        For an AutoencoderKL, `generator` samples them from the posterior. UNets like Stable Diffusion's were trained on
        such samples; the mode of the posterior lies close by but is not a typical latent. Other VAEs need no sampling.
        """
        with self._encoding():
            slices = (images.to(self.device) * 2 - 1).split(self._batch_size or len(images))
            latents = torch.cat([retrieve_latents(self._vae.encode(part), generator) for part in slices])
        return self._scaling.to_unet(latents).float()

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        if self._offloads:
            with self._encoder.in_use():
                yield
            return
        self._encoder.to_device()
        yield

    def _decoded(self, latents: Tensor) -> Tensor:
        """Decode to pixels around [-1, 1], not clamped, in the decoder's dtype."""
        with self.decoding():
            scaled = self._scaling.to_vae(latents).to(self._dtype)
            slices = scaled.split(self._batch_size or len(scaled))
            return torch.cat([self._decode_slice(part) for part in slices])

    def _decode_slice(self, scaled: Tensor) -> Tensor:
        work = Work("decoding", self._run_decoder, fixed=self._decoder_parts.parameters)
        return work.run(scaled) if self.graphs is None else self.graphs(work, scaled)

    def _run_decoder(self, scaled: Tensor) -> Tensor:
        return self._vae.decode(scaled, return_dict=False)[0]

    def _converted(self, dtype: torch.dtype) -> FrozenNetwork:
        """The decoder in another dtype, made of the original; on a GPU in the memory format of its convolutions."""
        self._original.to_cpu()
        module: Any = self._decoder_parts.to(dtype)
        if self.device.type == "cuda":
            module.to(memory_format=torch.channels_last)
        return FrozenNetwork(module, self.device)

    def _place_decoder(self) -> None:
        """Puts the decoder where it belongs: on the device, unless it is idle and idle parts leave it."""
        if self._num_users or not self._offloads:
            self._decoder.to_device()
        else:
            self._decoder.to_cpu()


def _images(pixels: Tensor) -> Tensor:
    """Returns images (B, 3, H, W) float32 in [0, 1] of what a decoder gives."""
    return (pixels / 2 + 0.5).clamp(0, 1).float()
