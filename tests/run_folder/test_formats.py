"""Exports of a run for other tools: what they hold, what they say, and that images stay the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import yaml
from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.assembly import assemble
from rlcm_fast.backbones.extraction import extract_lora
from rlcm_fast.backbones.lora_layouts import add_lora, read_lora
from rlcm_fast.cli.main import main as rlcm_fast
from rlcm_fast.config import ModelConfig, parse_config
from rlcm_fast.run_folder.sampler_file import read_sampler
from rlcm_fast.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_process")
KIND = "consistency"
BIAS = "model.diffusion_model.time_embed.0.bias"
SETTINGS = {"checkpoint.every": 1, "checkpoint.keep": 5, "optimizer.lr": 1e-2, "tracking.grid_every": 2}


def trained(model: str, run_dir: Path, **settings: object) -> Path:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    trainer = Trainer(parse_config(tiny_runs.arguments(model, run_dir, {**SETTINGS, "num_iterations": 2, **changes})))
    trainer.run()
    return run_dir


@pytest.fixture(scope="module")
def run(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every weight of a consistency model with a guidance input, six iterations, so that it has curves."""
    return trained(tiny_lcm_folder, tmp_path_factory.mktemp("full") / "my_run", num_iterations=6)


@pytest.fixture(scope="module")
def lora_run(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"lora.rank": 2, "lora.alpha": 4.0, "ema.decay": 0.5}
    return trained(tiny_lcm_folder, tmp_path_factory.mktemp("lora") / "run", **settings)


def unet_of(folder: Path) -> dict[str, Tensor]:
    return UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, weight in one.items() if not torch.equal(weight, other[name])] == []


def export(run_dir: Path, *arguments: str) -> int:
    return rlcm_fast(["export", str(run_dir), "--dtype", "fp32", *arguments])


def test_a_single_file_holds_the_exported_model_and_its_recipe(run: Path, tiny_lcm_folder: str, capsys: Any):
    assert export(run, "--format", "single-file") == 0
    file = run / "exports" / "single-file" / "my_run.safetensors"
    assert f"iteration 6 of {run} in {file}" in capsys.readouterr().out
    read = assemble(ModelConfig(str(file), base=tiny_lcm_folder), torch.float32, KIND)
    assert_equal(read.unet.state_dict(), unet_of(run / "export"))
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
    recipe = json.loads(metadata["rlcm_fast.recipe"])
    assert (recipe["finished_iterations"], recipe["policy"]["num_steps"]) == (6, 3)
    assert metadata["modelspec.title"] == "my_run"
    assert recipe["run_dir"] == "my_run" and str(run.parent) not in metadata["rlcm_fast.recipe"]


def test_what_is_exported_says_how_it_was_sampled(run: Path, lora_run: Path, tmp_path: Path):
    assert export(run, "--format", "single-file", "--out", str(tmp_path)) == 0
    exports = [run / "export", tmp_path / "my_run.safetensors", tmp_path, lora_run / "export", lora_run / "lora"]
    policies = [read_sampler(str(place)) for place in exports]
    assert None not in policies
    sampled = {(policy.num_steps, policy.guidance_scale, policy.eta) for policy in policies if policy is not None}
    assert sampled == {(3, 4.0, 1.0)}
    assert [policy.kind for policy in policies if policy is not None] == [KIND, "auto", KIND, KIND, KIND]
    image = tmp_path / "grid.png"
    given = ["--prompt", "a star", "--num-images", "1", "--out", str(image)]
    assert rlcm_fast(["sample", "--model", str(run / "export"), *given]) == 0


@pytest.mark.parametrize("format_", ["diffusers", "single-file", "safetensors-unet", "lora"])
def test_others_may_read_what_the_umask_lets_them_read(format_: str, run: Path, lora_run: Path, tmp_path: Path):
    assert export(lora_run if format_ == "lora" else run, "--format", format_, "--out", str(tmp_path / "out")) == 0
    plain = tmp_path / "plain"
    plain.touch()
    files = [*run.glob("export/**/*.safetensors"), *lora_run.glob("*/**/*.safetensors"), *tmp_path.glob("out/**/*")]
    modes = {file.name: oct(file.stat().st_mode) for file in files if file.is_file()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {oct(plain.stat().st_mode)}, modes


def test_the_unet_alone_goes_into_its_pipeline_again(run: Path, tiny_lcm_folder: str, tmp_path: Path):
    assert export(run, "--format", "safetensors-unet", "--out", str(tmp_path)) == 0
    read = assemble(
        ModelConfig(str(tmp_path / "my_run_unet.safetensors"), base=tiny_lcm_folder), torch.float32, "consistency"
    )
    assert_equal(read.unet.state_dict(), unet_of(run / "export"))


def test_an_earlier_iteration_is_exported_as_a_folder(run: Path, tmp_path: Path):
    assert export(run, "--iteration", "4", "--out", str(tmp_path / "four")) == 0
    checkpoint = load_file(run / "checkpoints" / "iteration_000004" / "unet.safetensors")
    assert_equal(unet_of(tmp_path / "four"), checkpoint)
    stock = LatentConsistencyModelPipeline.from_pretrained(tmp_path / "four", safety_checker=None)
    assert stock.scheduler.config["original_inference_steps"] == 50
    assert "for 4 iterations" in (tmp_path / "four" / "README.md").read_text()


def test_adapters_are_exported_with_their_average_and_alpha(lora_run: Path, tmp_path: Path, tiny_lcm_folder: str):
    for name in ("a", "b"):
        assert export(lora_run, "--format", "lora", "--out", str(tmp_path / name)) == 0
    for file in ("kohya.safetensors", "pytorch_lora_weights.safetensors"):
        assert_equal(load_file(tmp_path / "a" / file), load_file(lora_run / "lora" / file))
    assert export(lora_run, "--format", "single-file", "--out", str(tmp_path / "c")) == 0
    read = assemble(
        ModelConfig(str(tmp_path / "c" / "run.safetensors"), base=tiny_lcm_folder), torch.float32, "consistency"
    )
    for name, weight in unet_of(lora_run / "export").items():
        torch.testing.assert_close(read.unet.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


def test_a_model_card_says_what_it_is_made_of(run: Path, lora_run: Path):
    card = (run / "export" / "README.md").read_text()
    assert card.isascii()
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["pipeline_tag"] == "text-to-image" and "rlcm_fast" in head["tags"] and "lora" not in head["tags"]
    assert "plugin_rewards:Brightness (1), for 6 iterations" in card
    assert "| sampler | consistency, 3 steps, guidance 4 |" in card
    assert 'from_pretrained("my_run/export")' in card and "num_inference_steps=3, guidance_scale=4" in card
    for picture in ("curves.png", "before.png", "after.png"):
        assert f"]({picture})" in card and (run / "export" / picture).stat().st_size > 100
    lora = (lora_run / "lora" / "README.md").read_text()
    assert "lora" in yaml.safe_load(lora.split("---\n")[1])["tags"]
    merged = (lora_run / "export" / "README.md").read_text()
    assert "lora" not in yaml.safe_load(merged.split("---\n")[1])["tags"], "the adapters are merged in"
    assert "LoRA of rank 2, alpha 4" in lora and "curves.png" not in lora, "two points are no curve"


def test_the_difference_is_extracted_and_its_errors_are_stated(run: Path, tmp_path: Path, capsys: Any):
    printed = []
    for rank in ("1", "64"):
        assert export(run, "--extract-lora", rank, "--num-images", "2", "--out", str(tmp_path / rank)) == 0
        printed.append(capsys.readouterr().out)
    errors = [float(text.split("leaves out ")[1].split("%")[0]) for text in printed]
    images = [float(text.split("differ by ")[1].split(" ")[0]) for text in printed]
    without = float(printed[0].rsplit("LoRA by ", 1)[1])
    assert errors[0] > errors[1] and images[0] > images[1]
    assert images[1] < 0.5 * without
    assert f"leaves out {errors[1]}% of the change" in (tmp_path / "64" / "README.md").read_text()


def test_the_extracted_lora_is_the_best_of_its_rank(tmp_path: Path):
    start, tuned = tiny_pipelines.unet(), tiny_pipelines.unet(seed=1)
    full = extract_lora(start, tuned.state_dict(), rank=10_000)
    assert full.error == pytest.approx(full.unreachable, abs=1e-6), "only norms and biases are left"
    small = extract_lora(start, tuned.state_dict(), rank=2)
    layer, total = small.layers["down_blocks.0.resnets.0.conv1"], 0.0
    name = "down_blocks.0.resnets.0.conv1.weight"
    delta = tuned.state_dict()[name] - start.state_dict()[name]
    u, s, v = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
    best = (u[:, :2] * s[:2]) @ v[:2]
    torch.testing.assert_close(layer.delta(delta.shape).flatten(1).double(), best, atol=1e-6, rtol=1e-4)
    for name, weight in start.state_dict().items():
        rest = tuned.state_dict()[name] - weight
        place = name.removesuffix(".weight")
        total += (rest - (small.layers[place].delta(rest.shape) if place in small.layers else 0)).square().sum().item()
    whole = sum((tuned.state_dict()[n] - w).square().sum().item() for n, w in start.state_dict().items())
    assert small.error == pytest.approx((total / whole) ** 0.5, rel=1e-4)
    with pytest.raises(ValueError, match="there is no difference to extract"):
        extract_lora(start, start.state_dict(), rank=2)


def test_a_lora_relative_to_a_base_model_without_a_guidance_input(run: Path, tiny_sd_folder: str, tmp_path: Path):
    arguments = ["--extract-lora", "64", "--relative-to", tiny_sd_folder, "--num-images", "0", "--out", str(tmp_path)]
    assert export(run, *arguments) == 0
    base, tuned = tiny_pipelines.unet(), unet_of(run / "export")
    add_lora(read_lora(tmp_path / "kohya.safetensors", {"unet": base}), {"unet": base})
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(base.state_dict()[name], tuned[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "lora"], "finds no adapters: .*give --extract-lora 64"),
        (["--iteration", "9"], r"iteration=9 is not among the checkpoints that run=.* kept \(2, 3, 4, 5, 6\)"),
        (["--format", "single-file", "--extract-lora", "4"], "extract-lora=4 writes a LoRA, not format=single-file"),
        (["--relative-to", "x"], "relative-to=x is for --extract-lora RANK"),
        (["--guidance-scale", "0"], "guidance-scale=0 is for --format single-file and safetensors-unet"),
    ],
)
def test_mistakes_are_one_line(run: Path, arguments: list[str], message: str, capsys: Any):
    assert export(run, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert re.search(message, line)


def test_a_guidance_scale_of_zero_is_one(run: Path, tmp_path: Path):
    for scale in ("0", "4"):
        given = ["--format", "safetensors-unet", "--guidance-scale", scale, "--out", str(tmp_path / scale)]
        assert export(run, *given) == 0
        assert f"fixed to {scale} in this file" in (tmp_path / scale / "README.md").read_text()
    biases = [load_file(tmp_path / scale / "my_run_unet.safetensors")[BIAS] for scale in ("0", "4")]
    assert not torch.equal(*biases)


def test_a_format_that_has_no_place_for_the_model_leaves_no_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr("rlcm_fast.backbones.single_file_writing.AutoencoderKL", UNet2DConditionModel)
    assert export(run, "--format", "single-file", "--out", str(tmp_path / "file")) == 2
    assert "a single file holds an AutoencoderKL" in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: Any):
    for best in ([], ["--best"]):
        assert export(tmp_path, *best) == 2
        assert "is not the folder of a run: it has no config.yaml" in capsys.readouterr().err
        assert export(tmp_path / "nope", *best) == 2
        assert "nope is not a folder; give the run_dir of a run" in capsys.readouterr().err
