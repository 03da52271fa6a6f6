"""Images that are not square: the size of the config is that of latents, rewards, grids, plans and exports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli.main import main as rlcm_fast
from rlcm_fast.config import ModelConfig, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.planner.tracing import Setup, unet_inputs
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")
HIGH, WIDE = 24, 16  # pixels


def test_a_run_draws_scores_and_exports_its_size(tiny_lcm_folder: str, tmp_path: Path):
    settings = {"model.image_size": [HIGH, WIDE], "num_iterations": 2, "tracking.grid_every": 1}
    trainer = Trainer(parse_config(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)))
    x_0 = trainer.images.policy.sample(trainer.images.encode([Prompt("a star")]), torch.Generator().manual_seed(1))[1]
    assert x_0.shape == (1, 4, HIGH // 2, WIDE // 2)
    assert trainer.images.backbone.decode(x_0).shape == (1, 3, HIGH, WIDE)
    trainer.run()
    assert len(tiny_runs.metrics(tmp_path / "run")) == 2
    unet = json.loads((tmp_path / "run" / "export" / "unet" / "config.json").read_text())
    assert unet["sample_size"] == [HIGH // 2, WIDE // 2]
    assert Backbone.load(ModelConfig(str(tmp_path / "run" / "export")), torch.device("cpu"), torch.float32, True)
    file = tmp_path / "grid.png"
    model = ["--model", str(tmp_path / "run" / "export"), "--out", str(file)]
    assert rlcm_fast(["sample", "--prompt", "a star", "--num-images", "1", "--num-steps", "2", *model]) == 0
    (grid,) = [Image.open(file)]
    assert grid.height > 128 * HIGH / WIDE, "an image is 128 pixels wide in a grid, and higher than wide"


def test_sdxl_draws_as_stock_diffusers_at_that_size_and_is_told_of_it(tiny_sdxl_folder: str):
    model = ModelConfig(tiny_sdxl_folder, image_size=[HIGH, WIDE])
    backbone = Backbone.load(model, torch.device("cpu"), torch.float32, False)
    conditioning = backbone.encode([Prompt("a star")], with_negative=False)
    assert conditioning.time_ids is not None
    stock: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    expected = stock._get_add_time_ids((HIGH, WIDE), (0, 0), (HIGH, WIDE), torch.float32, 12)
    assert torch.equal(conditioning.time_ids, expected)


def test_the_plan_counts_the_pixels_of_both_sides(tiny_sdxl_folder: str, capsys: pytest.CaptureFixture[str]):
    architecture = load_architecture(tiny_sdxl_folder)
    setup = Setup(torch.float32, image_size=(HIGH, WIDE))
    assert unet_inputs(architecture, setup, 3, torch.device("meta"))["sample"].shape == (3, 4, HIGH // 2, WIDE // 2)
    options = ["--model.path", tiny_sdxl_folder, "--policy.kind", "ddim", "--model.image_size", "[48, 32]"]
    assert rlcm_fast(["plan", "--gpu", "a100-80gb", *options]) == 0
    assert "images of 48 x 32 pixels" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([512], r"model.image_size=\[512\] is no \[height, width\]"),
        ([512, 0], r"model.image_size=\[512, 0\] is no \[height, width\]"),
        ([512, -8], r"model.image_size\[1\]=-8 is out of range; give a side in pixels, \[height, width\], or 0"),
    ],
)
def test_a_size_that_is_none_is_refused(size: list[int], message: str):
    with pytest.raises(ValueError, match=message):
        validate(parse_config(["--model.image_size", json.dumps(size)]), 1)


def test_a_size_that_the_unet_cannot_halve_is_refused_with_one_that_it_can(tiny_lcm_folder: str):
    model = ModelConfig(tiny_lcm_folder, image_size=[18, 16])
    with pytest.raises(ValueError, match=r"model.image_size=\[18, 16\] must divide by 4; try \[16, 16\]"):
        Backbone.load(model, torch.device("cpu"), torch.float32, True)
