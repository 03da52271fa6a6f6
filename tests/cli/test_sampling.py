"""sample and evaluate draw as the run did that made a model: its sampler, timesteps, steps and guidance."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli.main import build_parser, main
from rlcm_fast.cli.pipelines import draw, load_pipeline
from rlcm_fast.cli.policy_scheduler import PolicyScheduler
from rlcm_fast.cli.sampling import Sampling, sampler_of
from rlcm_fast.config import ModelConfig, PolicyConfig
from rlcm_fast.policies import Network, build_policy
from rlcm_fast.run_folder.sampler_file import read_sampler, write_sampler
from rlcm_fast.trajectory import Prompt

BETAS = tiny_pipelines.BETAS
TRAILING = {**BETAS, "timestep_spacing": "trailing"}
DMD2 = [999, 749, 499, 249]
TEXT, SEED = "a red circle", 7
MAX_DIFFERENCE = 5e-6  # of an image, as in tests/policies; measured: at most 7e-7

# what the folder's scheduler is, and how the run sampled
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "dmd2": (LCMScheduler(**BETAS), {"kind": "consistency", "timesteps": DMD2, "guidance_scale": 1.0}),
    "guided lcm": (LCMScheduler(**BETAS), {"kind": "consistency", "num_steps": 3, "guidance_scale": 2.0}),
    "tcd": (TCDScheduler(**BETAS), {"kind": "tcd", "eta": 0.7, "num_steps": 3}),
    "tcd, named": (TCDScheduler(**BETAS), {"kind": "tcd", "eta": 0.3, "timesteps": [900, 600, 100]}),
    "ddim of pndm": (PNDMScheduler(**BETAS, skip_prk_steps=True), {"kind": "ddim", "num_steps": 4}),
    "ddim, named": (DDIMScheduler(**BETAS, clip_sample=False), {"kind": "ddim", "eta": 0.5, "timesteps": DMD2}),
    "lightning": (EulerDiscreteScheduler(**TRAILING), {"kind": "euler_ancestral", "guidance_scale": 1.0}),
    "turbo, named": (
        EulerAncestralDiscreteScheduler(**TRAILING),
        {"kind": "euler_ancestral", "timesteps": [999, 499], "guidance_scale": 1.0},
    ),
    "drawn image": (TCDScheduler(**BETAS), {"kind": "tcd", "num_steps": 1, "last_step": "sampled"}),
}


def arguments(model: str | Path, *more: str) -> argparse.Namespace:
    return build_parser().parse_args(["sample", "--model", str(model), "--prompt", TEXT, "--device", "cpu", *more])


def settled(model: str | Path, *more: str) -> tuple[Any, Sampling]:
    given = arguments(model, *more)
    pipeline = load_pipeline(given.model, given.revision, "cpu", given.lora)
    return pipeline, Sampling.settle(pipeline, given)


def image_of(pipeline: Any, sampling: Sampling) -> Tensor:
    images, _ = draw(pipeline, [TEXT], sampling.num_steps[0], sampling.guidance_scale, SEED, 1)
    return images


def image_of_policy(folder: str | Path, config: PolicyConfig) -> Tensor:
    """Draws as an evaluation does."""
    backbone = Backbone.load(ModelConfig(str(folder)), torch.device("cpu"), torch.float32, config.kind)
    policy = build_policy(config, Network(backbone.unet, backbone.unet.config), backbone.scheduler_config)
    conditioning = backbone.encode([Prompt(TEXT)], policy.needs_negative)
    _, x_0 = policy.sample(conditioning, torch.Generator().manual_seed(SEED), explores=False)
    return backbone.decode(x_0)


@pytest.mark.parametrize("case", CASES)
def test_an_export_is_drawn_as_its_policy_draws(case: str, tmp_path: Path):
    scheduler, fields = CASES[case]
    folder, policy = tiny_pipelines.save_sd(tmp_path, scheduler), PolicyConfig(**fields)
    write_sampler(policy, tmp_path)
    pipeline, sampling = settled(folder)
    assert sampling == Sampling((policy.num_steps,), policy.guidance_scale)
    drawn = image_of(pipeline, sampling)
    assert (drawn - image_of_policy(folder, policy)).abs().max() < MAX_DIFFERENCE
    assert sampler_of(pipeline).startswith(policy.kind)


@pytest.mark.parametrize("model", ["lcm", "sdxl"])
def test_other_pipelines_draw_as_their_policies_too(model: str, tmp_path: Path, request: pytest.FixtureRequest):
    folder = tmp_path / "export"
    shutil.copytree(request.getfixturevalue(f"tiny_{model}_folder"), folder)
    kind = {"lcm": "consistency", "sdxl": "euler_ancestral"}[model]
    policy = PolicyConfig(kind=kind, timesteps=[999, 700, 200], guidance_scale=3.0)  # type: ignore[arg-type]
    write_sampler(policy, folder)
    assert (image_of(*settled(folder)) - image_of_policy(folder, policy)).abs().max() < MAX_DIFFERENCE


def test_a_consistency_model_is_drawn_as_its_stock_scheduler_draws(tiny_lcm_folder: str, tmp_path: Path):
    shutil.copytree(tiny_lcm_folder, tmp_path / "export")
    write_sampler(PolicyConfig(kind="consistency", num_steps=3, guidance_scale=6.0), tmp_path / "export")
    ours, sampling = settled(tmp_path / "export")
    stock = load_pipeline(tiny_lcm_folder, device="cpu")
    assert isinstance(ours.scheduler, PolicyScheduler) and isinstance(stock.scheduler, LCMScheduler)
    assert (image_of(ours, sampling) - image_of(stock, sampling)).abs().max() < MAX_DIFFERENCE


def test_named_timesteps_are_those_of_the_stock_pipeline(tiny_sd_folder: str, tmp_path: Path):
    folder = tiny_pipelines.save_sd(tmp_path, TCDScheduler(**BETAS))
    ours, sampling = settled(folder, "--timesteps", "900,600,100", "--guidance-scale", "1")
    stock: Any = load_pipeline(folder, device="cpu")
    generator = torch.Generator().manual_seed(SEED)
    settings: dict[str, Any] = {"timesteps": [900, 600, 100], "guidance_scale": 1.0, "eta": 0.3, "output_type": "pt"}
    expected = stock(prompt=TEXT, generator=generator, **settings).images
    assert (image_of(ours, sampling) - expected).abs().max() < MAX_DIFFERENCE


def test_arguments_replace_what_the_run_had(tmp_path: Path):
    folder = tiny_pipelines.save_sd(tmp_path, LCMScheduler(**BETAS))
    write_sampler(PolicyConfig(kind="consistency", timesteps=DMD2, guidance_scale=2.0), tmp_path)
    shown = {}
    for given in ((), ("--num-steps", "4"), ("--num-steps", "2"), ("--timesteps", "800,300", "--guidance-scale", "0")):
        pipeline, sampling = settled(folder, *given)
        image_of(pipeline, sampling)
        shown[given] = (sampler_of(pipeline), sampling.guidance_scale)
    assert list(shown.values()) == [
        ("consistency, timesteps 999 749 499 249", 2.0),
        ("consistency, timesteps 999 749 499 249", 2.0),
        ("consistency, timesteps 999 499", 2.0),
        ("consistency, timesteps 800 300", 0.0),
    ]


def test_a_model_of_others_keeps_its_scheduler_and_the_old_defaults(tiny_sd_folder: str):
    pipeline, sampling = settled(tiny_sd_folder)
    assert sampling == Sampling((4,), 4.0) and sampler_of(pipeline) == "DDIMScheduler"


def test_the_sampler_comes_with_a_lora_too(tiny_sd_folder: str, tmp_path: Path):
    lora = tiny_pipelines.save_lora(tmp_path, tiny_pipelines.unet())
    policy = PolicyConfig(kind="ddim", num_steps=2, guidance_scale=1.5)
    write_sampler(policy, tmp_path)
    for given in (lora, f"{lora}/pytorch_lora_weights.safetensors"):
        pipeline, sampling = settled(tiny_sd_folder, "--lora", given)
        assert sampling == Sampling((2,), 1.5) and isinstance(pipeline.scheduler, PolicyScheduler)
    assert read_sampler(lora) == policy


def test_the_report_says_how_it_was_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tiny_pipelines.save_sd(tmp_path, LCMScheduler(**BETAS))
    write_sampler(PolicyConfig(kind="consistency", timesteps=[999, 499], guidance_scale=1.0), tmp_path)
    assert main(["evaluate", "--model", folder, "--rewards", "jpeg_compressibility", "--num-images", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["guidance_scale"] == 1.0
    assert [r["sampler"] for r in report["results"]] == ["consistency, timesteps 999 499"]
    assert main(["sample", "--model", folder, "--prompt", TEXT, "--out", str(tmp_path / "a.png")]) == 0
    assert "a.png (consistency, timesteps 999 499; 2 steps, guidance 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--timesteps", "999,x"], "999,x is not allowed: give whole numbers, as 999,749,499,249"),
        (["--timesteps", "249,999"], "the numbers must fall, noisiest first"),
        (["--timesteps", "999", "--num-steps", "4"], "argument --num-steps: not allowed with argument --timesteps"),
    ],
)
def test_wrong_timesteps_are_refused_before_anything_loads(more: list[str], message: str, capsys: Any):
    with pytest.raises(SystemExit):
        arguments("/no/where", *more)
    printed = capsys.readouterr().err
    assert message in printed and printed.count("\n") == 1


def test_timesteps_that_the_model_was_not_trained_on_are_refused(tiny_sd_folder: str, capsys: Any):
    assert main(["sample", "--model", tiny_sd_folder, "--prompt", TEXT, "--timesteps", "1000,500"]) == 2
    assert "timesteps=[1000, 500] must lie in [0, 999]" in capsys.readouterr().err


def test_a_damaged_file_is_named(tiny_sd_folder: str, tmp_path: Path, capsys: Any):
    shutil.copytree(tiny_sd_folder, tmp_path / "export")
    (tmp_path / "export" / "sampler.json").write_text('{"kind": "dpm"}')
    assert main(["sample", "--model", str(tmp_path / "export"), "--prompt", TEXT]) == 2
    assert "sampler.json does not say how to sample (" in capsys.readouterr().err
