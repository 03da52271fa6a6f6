"""Decoding in slices, and parts that are on the device only while they work; `meta` stands in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig
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
def moves(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """(class, device) of every Module.to; a part gets its weights back when it comes home from the meta device."""
    recorded: list[tuple[str, str]] = []
    at_home: dict[nn.Module, dict[str, torch.Tensor]] = {}
    to = nn.Module.to

    def spy(part: nn.Module, *arguments: Any, **keywords: Any) -> nn.Module:
        target = str(arguments[0]) if arguments else ""
        if target in ("meta", "cpu"):
            recorded.append((type(part).__name__, target))
        if target == "meta":
            at_home[part] = {name: value.clone() for name, value in part.state_dict().items()}
        if target != "cpu" or part not in at_home:
            return to(part, *arguments, **keywords)
        part.to_empty(device="cpu").load_state_dict(at_home.pop(part))
        return part

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "to", spy)
        yield recorded


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
    assert moves == [("UNet2DConditionModel", "meta")]
    working: list[str] = []
    for part in (*backbone.text_encoders, backbone._pipeline.vae.decoder):
        part.register_forward_pre_hook(lambda module, _: working.append(device_of(module)))

    moves.clear()
    conditioning = backbone.encode(PROMPTS, with_negative=True)
    assert conditioning.embeds.device == DEVICE
    assert len(moves) == 2 * num_encoders, "there and back, once for all texts"
    backbone.encode(PROMPTS, with_negative=True)
    assert len(moves) == 2 * num_encoders, "nothing new to encode"
    assert backbone.decode(latents(2).to(DEVICE)).shape == (2, 3, 16, 16)
    assert moves[-2:] == [("AutoencoderKL", "meta"), ("AutoencoderKL", "cpu")]
    assert set(working) == {"meta"}
    assert {device_of(part) for part in backbone.frozen_parts} == {"cpu"}


def test_a_part_goes_home_after_an_error_too(tiny_sd_folder: str, moves: list[tuple[str, str]]):
    backbone = load(tiny_sd_folder, DEVICE, offload_idle=True)
    with pytest.raises(RuntimeError):
        backbone.decode(torch.zeros(2, 3, 8, 8, device=DEVICE))
    assert {device_of(part) for part in backbone.frozen_parts} == {"cpu"}


def test_all_parts_stay_on_the_device_unless_idle_ones_are_offloaded(tiny_sd_folder: str):
    backbone = load(tiny_sd_folder, DEVICE)
    assert {device_of(part) for part in (*backbone.frozen_parts, backbone.unet)} == {"meta"}


def test_on_a_cpu_offloading_does_nothing(tiny_sdxl_folder: str, moves: list[tuple[str, str]]):
    plain, offloaded = load(tiny_sdxl_folder), load(tiny_sdxl_folder, offload_idle=True)
    moves.clear()
    assert torch.equal(offloaded.decode(latents(2)), plain.decode(latents(2)))
    ours, theirs = (backbone.encode(PROMPTS, with_negative=True) for backbone in (offloaded, plain))
    assert torch.equal(ours.embeds, theirs.embeds)
    assert torch.equal(ours.negative_embeds, theirs.negative_embeds)  # type: ignore[arg-type]
    assert moves == []
