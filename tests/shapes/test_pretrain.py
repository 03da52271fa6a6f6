"""The command that makes the shipped models, with a handful of steps, and the cuts that the decoder learns from."""

from __future__ import annotations

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

from rlcm_fast.shapes.pretrain import report, vae


def pretrain(*arguments: str) -> None:
    """What `python -m rlcm_fast.shapes.pretrain` does, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain", *arguments])
        runpy.run_module("rlcm_fast.shapes.pretrain", run_name="__main__")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All stages, each with a step or two; its report draws with few steps too."""
    out = tmp_path_factory.mktemp("pretrain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "_TEACHER_STEPS", (2, 3))
        patch.setattr(report, "_GRID_ROWS", (("lcm", 1), ("teacher", 2)))
        pretrain("all", "--out", str(out), "--fraction", "0.0003", "--num-images", "64", "--num-scored", "4")
    return out


@pytest.mark.parametrize("name", ["teacher", "lcm"])
def test_one_command_makes_folders_that_stock_diffusers_loads(made: Path, name: str):
    pipeline: Any = DiffusionPipeline.from_pretrained(made / name)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(["a red circle"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)


def test_its_report_has_a_row_for_every_sampler_split_and_kind_of_caption(made: Path):
    rows = list(csv.DictReader((made / "scores.csv").open()))
    assert len(rows) == 6 * 2 * 2
    assert {row["num_images"] for row in rows} == {"2"}
    assert (made / "grid.png").exists()


def test_a_finished_stage_is_not_trained_again(made: Path):
    states = sorted(made.glob("*.pt"))
    before = [path.stat().st_mtime_ns for path in states]
    pretrain("lcm", "--out", str(made), "--fraction", "0.0003")
    assert [path.stat().st_mtime_ns for path in states] == before
    assert {path.stem for path in states} >= {"vae_joint", "vae_decoder", "teacher", "teacher_2", "lcm", "lcm_2"}


def test_windows_show_the_same_place_in_pixels_and_in_latents():
    generator = torch.Generator().manual_seed(0)
    latents = torch.arange(3 * 64.0).view(3, 1, 8, 8)
    pixels = latents.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    corners = vae._coloured_corners(pixels.expand(3, 3, 64, 64), 40, 8, generator)
    small, large = vae._cut(latents, corners, 5, 8), vae._cut(pixels, corners, 40)
    assert small.shape == (3, 1, 5, 5)
    torch.testing.assert_close(large[:, :, ::8, ::8], small)
    torch.testing.assert_close(large[:, :, 7::8, 7::8], small)


def test_of_two_crops_the_one_that_shows_more_colour_is_taken():
    image = torch.full((1, 3, 64, 64), 128, dtype=torch.uint8)
    image[:, 0, :32] = 255
    rows = [
        y for seed in range(50) for y, _ in vae._coloured_corners(image, 32, 1, torch.Generator().manual_seed(seed))
    ]
    assert sum(rows) / len(rows) < 13  # the smaller of two numbers from 0 to 32 is 10.7 on average, one number 16


def test_pixels_beside_a_cut_do_not_count_but_those_at_the_edge_of_the_image_do():
    top_left, middle, bottom_right = vae._inside([(0, 0), (8, 16), (24, 24)], 64)[:, 0]
    cut = vae._CUT
    assert top_left[:-cut, :-cut].all() and not top_left[-cut:].any() and not top_left[:, -cut:].any()
    assert middle[cut:-cut, cut:-cut].all() and middle.sum() == (40 - 2 * cut) ** 2
    assert bottom_right[cut:, cut:].all() and not bottom_right[:cut].any() and not bottom_right[:, :cut].any()
