"""Decoding in slices, and parts that are on the device only while they work; `meta` stands in for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from rlcm_fast.backbones.image_coder import BothPrecisions, ImageCoder, Verdict
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig
from rlcm_fast.frozen import FrozenNetwork
from rlcm_fast.trajectory import Prompt

CPU, DEVICE = torch.device("cpu"), torch.device("meta")
PROMPTS = [Prompt("a red circle"), Prompt("a star")]


def load(folder: str, device: torch.device = CPU, **settings: Any) -> Backbone:
    return Backbone.load(ModelConfig(folder), device, torch.float32, kind="ddim", **settings)


def latents(num_images: int) -> torch.Tensor:
    return torch.randn(num_images, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def device_of(part: nn.Module) -> str:
    (device,) = {p.device.type for p in part.parameters()}
    return device


@pytest.fixture
def moves(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(class, place) of every network that leaves one place for the other."""
    recorded: list[tuple[str, str]] = []

    def noted(name: str, place: str) -> Callable[[FrozenNetwork], None]:
        move = getattr(FrozenNetwork, name)

        def moved(frozen: FrozenNetwork) -> None:
            was_there = frozen._is_on_device
            move(frozen)
            if was_there != frozen._is_on_device:
                recorded.append((type(frozen.network).__name__, place))

        return moved

    monkeypatch.setattr(FrozenNetwork, "to_device", noted("to_device", "device"))
    monkeypatch.setattr(FrozenNetwork, "to_cpu", noted("to_cpu", "cpu"))
    return recorded


@pytest.mark.parametrize("size, slices", [(0, [5]), (2, [2, 2, 1]), (8, [5])])
def test_images_decoded_in_slices_are_those_of_the_whole(tiny_lcm_folder: str, size: int, slices: list[int]):
    backbone, whole = load(tiny_lcm_folder, decode_batch_size=size), load(tiny_lcm_folder)
    seen: list[int] = []
    backbone._pipeline.vae.decoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    torch.testing.assert_close(backbone.decode(latents(5)), whole.decode(latents(5)), atol=1e-6, rtol=0)
    assert seen == slices


@pytest.mark.parametrize("kind, num_encoders", [("sd", 1), ("sdxl", 2)])
def test_idle_parts_are_on_the_device_only_while_they_work(
    kind: str, num_encoders: int, moves: list[tuple[str, str]], request: pytest.FixtureRequest
):
    backbone = load(request.getfixturevalue(f"tiny_{kind}_folder"), DEVICE, offload_idle=True)
    assert len(backbone.text_encoders) == num_encoders
    assert device_of(backbone.unet) == "meta"
    assert {device_of(part) for part in backbone.frozen_parts} == {"cpu"}
    working: list[str] = []
    for part in (*backbone.text_encoders, backbone._pipeline.vae.decoder):
        part.register_forward_pre_hook(lambda module, _: working.append(device_of(module)))

    moves.clear()
    conditioning = backbone.encode(PROMPTS, with_negative=True)
    assert conditioning.embeds.device == DEVICE
    assert len(moves) == 2 * num_encoders, "there and back, once for all texts"
    backbone.encode(PROMPTS, with_negative=True)
    assert len(moves) == 2 * num_encoders, "nothing new to encode"
    moves.clear()
    assert backbone.decode(latents(2).to(DEVICE)).shape == (2, 3, 16, 16)
    assert [place for _, place in moves] == ["device", "cpu"], "the decoder alone"
    moves.clear()
    with backbone.decoding():
        for _ in range(3):
            backbone.decode(latents(2).to(DEVICE))
    assert [place for _, place in moves] == ["device", "cpu"], "once for all micro-batches of a rollout"
    assert set(working) == {"meta"}
    assert {device_of(part) for part in backbone.frozen_parts} == {"cpu"}


def test_a_part_goes_home_after_an_error_too(tiny_sd_folder: str, moves: list[tuple[str, str]]):
    backbone = load(tiny_sd_folder, DEVICE, offload_idle=True)
    with pytest.raises(RuntimeError):
        backbone.decode(torch.zeros(2, 3, 8, 8, device=DEVICE))
    assert {device_of(part) for part in backbone.frozen_parts} == {"cpu"}


def test_what_works_stays_on_the_device_and_the_encoder_comes_with_real_images(tiny_sd_folder: str):
    backbone = load(tiny_sd_folder, DEVICE)
    vae = backbone._pipeline.vae
    assert {device_of(part) for part in (vae.decoder, vae.post_quant_conv, *backbone.text_encoders)} == {"meta"}
    assert {device_of(part) for part in (vae.encoder, vae.quant_conv)} == {"cpu"}
    backbone.encode_images(torch.zeros(2, 3, 16, 16))
    assert {device_of(part) for part in backbone.frozen_parts} == {"meta"}


def test_an_export_has_the_whole_vae_in_float32_and_the_run_goes_on(tiny_sd_folder: str, tmp_path: Path):
    model = ModelConfig(tiny_sd_folder, vae_dtype="bf16")
    backbone = Backbone.load(model, CPU, torch.float32, kind="ddim")
    before = backbone.decode(latents(2))
    backbone.export(backbone.unet.state_dict(), tmp_path)
    exported = AutoencoderKL.from_pretrained(tmp_path, subfolder="vae").state_dict()
    original = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae").state_dict()
    assert exported.keys() == original.keys()
    assert all(torch.equal(weight, original[name]) for name, weight in exported.items())
    assert torch.equal(backbone.decode(latents(2)), before)
    assert not torch.equal(before, load(tiny_sd_folder).decode(latents(2)))


def test_an_export_is_a_whole_pipeline_with_the_vae_that_was_put_in_place_of_the_models(
    tiny_sdxl_folder: str, tmp_path: Path
):
    other: Any = AutoencoderKL.from_pretrained(tiny_sdxl_folder, subfolder="vae")
    other.decoder.conv_out.weight.data *= 2
    other.register_to_config(force_upcast=False)
    other.save_pretrained(tmp_path / "vae")
    model = ModelConfig(tiny_sdxl_folder, vae=str(tmp_path / "vae"))
    backbone = Backbone.load(model, CPU, torch.float32, kind="ddim")
    backbone.export(backbone.unet.state_dict(), tmp_path / "export")
    stock: Any = DiffusionPipeline.from_pretrained(tmp_path / "export")
    assert stock.vae.config.force_upcast is False
    assert all(torch.equal(weight, other.state_dict()[name]) for name, weight in stock.vae.state_dict().items())
    images = stock.vae.decode(latents(2) / other.config.scaling_factor).sample
    torch.testing.assert_close(backbone.decode(latents(2)), (images / 2 + 0.5).clamp(0, 1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("overflows", [False, True])
def test_float16_is_tried_on_the_first_latents_and_kept_if_it_is_as_good(tiny_sd_folder: str, overflows: bool):
    said: list[str] = []
    vae: Any = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae")
    if overflows:  # as SDXL's VAE does
        vae.decoder.conv_in.weight.data *= 1e6
    in_single = ImageCoder(copy.deepcopy(vae), CPU).decode(latents(5))
    coder = ImageCoder(vae, CPU, "auto")
    coder.say = said.append
    decoded = [coder.decode(latents(5)) for _ in range(2)]
    assert torch.equal(*decoded) and decoded[0].dtype == torch.float32
    (line,) = said
    assert ("decodes in float32" in line) == overflows
    assert torch.equal(decoded[0], in_single) == overflows
    assert (decoded[0] - in_single).abs().mean() < 0.5 / 255


@pytest.mark.parametrize("keeps_half", [False, True])
def test_a_judge_sees_the_images_of_both_precisions_and_decides(tiny_sd_folder: str, keeps_half: bool):
    vae: Any = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae")
    in_single = ImageCoder(copy.deepcopy(vae), CPU).decode(latents(5))
    in_half = ImageCoder(copy.deepcopy(vae), CPU, "fp16").decode(latents(5))
    seen, said = list[BothPrecisions](), list[str]()

    def judge(both: BothPrecisions) -> Verdict:
        seen.append(both)
        return Verdict(keeps_half, "as somebody says")

    coder = ImageCoder(vae, CPU, "auto")
    coder.say = said.append
    coder.choose_precision(latents(5).split(2), judge)
    (both,) = seen
    assert torch.allclose(both.single, in_single, atol=1e-6) and torch.allclose(both.half, in_half, atol=1e-2)
    assert both.is_close and both.change == pytest.approx((in_half - in_single).abs().mean().item(), rel=0.5)
    chosen = "float16" if keeps_half else "float32"
    assert said == [f"model.vae_dtype=auto: the VAE decodes in {chosen}, as somebody says"]
    assert torch.equal(coder.decode(latents(5)), in_half if keeps_half else in_single)
    coder.use_single()
    assert torch.equal(coder.decode(latents(5)), in_single)
    coder.use_half()
    assert torch.equal(coder.decode(latents(5)), in_half) and len(said) == 1


@pytest.mark.parametrize("overflows", [False, True])
def test_float16_is_tried_in_a_rollout_whose_decoder_moves_once(
    tiny_sd_folder: str, overflows: bool, moves: list[tuple[str, str]]
):
    vae: Any = AutoencoderKL.from_pretrained(tiny_sd_folder, subfolder="vae")
    if overflows:
        vae.decoder.conv_in.weight.data *= 1e6
    coder = ImageCoder(vae, CPU, "auto")
    coder._offloads = True  # as if the CPU were a GPU
    coder._place_decoder()
    is_there: list[bool] = []
    vae.decoder.register_forward_pre_hook(lambda *_: is_there.append(coder._decoder._is_on_device))
    for _ in range(2):  # rollouts
        moves.clear()
        with coder.decoding():
            for _ in range(3):
                coder.decode(latents(2))
        assert not coder._decoder._is_on_device
    assert len(is_there) == 2 + 2 * 3 and all(is_there)
    assert [place for _, place in moves] == ["device", "cpu"]


def test_tensors_that_modules_share_are_one_tensor_on_the_device_too():
    first, second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    second.weight = first.weight
    frozen = FrozenNetwork(nn.ModuleList([first, second]), DEVICE)
    frozen.to_device()
    assert first.weight is second.weight and first.weight.device == DEVICE
    frozen.to_cpu()
    assert first.weight is second.weight and first.weight.device == CPU


def test_on_a_cpu_offloading_does_nothing(tiny_sdxl_folder: str, moves: list[tuple[str, str]]):
    plain, offloaded = load(tiny_sdxl_folder), load(tiny_sdxl_folder, offload_idle=True)
    moves.clear()
    assert torch.equal(offloaded.decode(latents(2)), plain.decode(latents(2)))
    ours, theirs = (backbone.encode(PROMPTS, with_negative=True) for backbone in (offloaded, plain))
    assert torch.equal(ours.embeds, theirs.embeds)
    assert torch.equal(ours.negative_embeds, theirs.negative_embeds)  # type: ignore[arg-type]
    assert moves == []
