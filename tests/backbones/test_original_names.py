"""The original names of layers, against diffusers' converter, which goes the other way, and against kept lists."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.original_names import UNetNames
from rlcm_fast.planner.architecture import load_architecture

NAMES = Path(__file__).parent / "names"
MODELS = {
    "sd15_unet": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 686),
    "sd2_unet": ("stabilityai/stable-diffusion-2-base", 686),
    "sdxl_unet": ("stabilityai/stable-diffusion-xl-base-1.0", 1680),
}


def kept(name: str) -> list[str]:
    return gzip.decompress((NAMES / f"{name}.txt.gz").read_bytes()).decode().split()


@pytest.mark.parametrize("name", MODELS)
def test_the_weights_of_a_full_size_unet_have_the_original_names(name: str):
    model, number = MODELS[name]
    unet = load_architecture(model).build_unet()
    found = {UNetNames(unet.config).original(weight) for weight in unet.state_dict()}
    assert len(found) == number
    assert found == set(kept(name))


def round_trip(unet: Any) -> dict[str, str]:
    """What diffusers' converter calls each weight, by what the weight is called."""
    table = UNetNames(unet.config)
    names = {
        f"model.diffusion_model.{table.original(name)}": name for name in unet.state_dict() if table.original(name)
    }
    return convert_ldm_unet_checkpoint(names, unet.config)


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_converter_gives_the_names_back(name: str):
    unet = load_architecture(MODELS[name][0]).build_unet()
    back = round_trip(unet)
    assert all(theirs == ours for theirs, ours in back.items())
    assert back.keys() == unet.state_dict().keys()


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_other_numbers_of_blocks_are_counted_too_and_only_the_guidance_input_has_no_name(is_sdxl: bool):
    unet = tiny_pipelines.unet(time_cond_proj_dim=16, is_sdxl=is_sdxl)
    back = round_trip(unet)
    assert all(theirs == ours for theirs, ours in back.items())
    assert unet.state_dict().keys() - back.keys() == {"time_embedding.cond_proj.weight"}
