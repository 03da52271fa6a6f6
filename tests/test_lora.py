"""LoRA fine-tuning by the same loop: what moves, what is saved, resumed and exported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import LatentConsistencyModelPipeline
from safetensors.torch import load_file
from torch import Tensor

from rlcm_fast.cli.main import main as rlcm_fast
from rlcm_fast.config import parse_config
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")
SETTINGS = {"lora.rank": 2, "lora.alpha": 3.0, "update.kl_weight": 0.1, "optimizer.lr": 1e-2, "checkpoint.every": 2}

SMALL = {"policy__num_steps": 2, "prompts__images_per_prompt": 1, "update__num_updates": 1}


@dataclass(frozen=True)
class FinishedRun:
    trainer: Trainer
    run_dir: Path
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def make_trainer(model: str, run_dir: Path, **settings: object) -> Trainer:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    return Trainer(parse_config(tiny_runs.arguments(model, run_dir, {**SETTINGS, **changes})))


@pytest.fixture(scope="module")
def run(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> FinishedRun:
    return finished_run(tiny_lcm_folder, tmp_path_factory.mktemp("lora") / "run")


def finished_run(model: str, run_dir: Path, **settings: object) -> FinishedRun:
    trainer = make_trainer(model, run_dir, **settings)
    before = trainer.engine.full_weights()
    trainer.run()
    return FinishedRun(trainer, run_dir, before, trainer.engine.full_weights())


def draw(pipeline: Any, config: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": config.policy.num_steps, "guidance_scale": config.policy.guidance_scale}
    generator = torch.Generator().manual_seed(5)
    return pipeline("a red circle", generator=generator, output_type="pt", **settings).images


def test_the_adapters_move_and_nothing_else(run: FinishedRun):
    for name, weight in run.before.items():
        assert torch.equal(run.after[name], weight) == (".lora_" not in name), name
    lines = tiny_runs.metrics(run.run_dir)
    # Of two updates an iteration the first starts at the start model; B is zero there, and so is the divergence.
    assert 0 < lines[0]["kl_to_start"] < lines[2]["kl_to_start"]
    assert lines[0]["ratio/noise_floor"] < 1e-6


def test_the_adapters_of_a_run_on_its_start_model_draw_the_policys_image(
    run: FinishedRun, tiny_lcm_folder: str, tmp_path: Path
):
    conditioning = run.trainer.images.encode([Prompt("a red circle")])
    _, x_0 = run.trainer.images.policy.sample(conditioning, torch.Generator().manual_seed(5))
    expected = run.trainer.images.backbone.decode(x_0)
    stock = LatentConsistencyModelPipeline.from_pretrained(tiny_lcm_folder, safety_checker=None)
    assert (draw(stock, run.trainer.config) - expected).abs().max() > 1e-3
    stock.load_lora_weights(run.run_dir / "lora")
    torch.testing.assert_close(draw(stock, run.trainer.config), expected, atol=1e-5, rtol=0)
    whole = LatentConsistencyModelPipeline.from_pretrained(run.run_dir / "export", safety_checker=None)
    torch.testing.assert_close(draw(whole, run.trainer.config), expected, atol=1e-5, rtol=0)
    files = [tmp_path / name for name in ("export.png", "lora.png", "kohya.png", "start.png")]
    loras = [["--lora", str(lora)] for lora in (run.run_dir / "lora", run.run_dir / "lora" / "kohya.safetensors")]
    models = [[str(run.run_dir / "export")], *([tiny_lcm_folder, *lora] for lora in loras), [tiny_lcm_folder]]
    for file, model in zip(files, models, strict=True):
        assert rlcm_fast(["sample", "--prompt", "a star", "--out", str(file), "--model", *model]) == 0
    export, peft, kohya, start = (file.read_bytes() for file in files)
    assert export == peft == kohya != start


def test_a_checkpoint_holds_the_adapters_and_a_resumed_run_is_bitwise_the_same(run: FinishedRun, tiny_lcm_folder: str):
    last = run.run_dir / "checkpoints" / "iteration_000003" / "adapters.safetensors"
    saved = load_file(last)
    assert saved.keys() == {name for name in run.after if ".lora_" in name}
    assert all(torch.equal(weight, run.after[name]) for name, weight in saved.items())
    assert_small_and_resumed_bitwise(run, tiny_lcm_folder)


def assert_small_and_resumed_bitwise(run: FinishedRun, model: str, **settings: object) -> None:
    """A checkpoint is without the frozen UNet, and a run from it ends as the one that saved it."""
    earlier = min((run.run_dir / "checkpoints").iterdir())
    size = sum(file.stat().st_size for file in earlier.rglob("*") if file.is_file())
    frozen = sum(weight.nbytes for name, weight in run.before.items() if ".lora_" not in name)
    assert size < frozen, [(str(file), file.stat().st_size) for file in earlier.rglob("*")]
    resumed = make_trainer(model, run.run_dir, resume=str(earlier), **settings)
    resumed.run()
    assert all(torch.equal(weight, run.after[name]) for name, weight in resumed.engine.full_weights().items())


@pytest.mark.parametrize(
    "settings",
    [
        {"engine__zero_stage": 2},
        {"engine__zero_stage": 3},
        {"engine__optimizer_in_backward": True, "optimizer__name": "adamw_8bit"},
    ],
    ids=["stage_2", "stage_3", "in_backward"],
)
def test_so_are_those_of_the_other_engines(settings: dict[str, Any], tiny_lcm_folder: str, tmp_path: Path):
    short = {**SMALL, "update__kl_weight": 0.0, "num_iterations": 2, "checkpoint__every": 1, **settings}
    run = finished_run(tiny_lcm_folder, tmp_path / "run", **short)
    assert_small_and_resumed_bitwise(run, tiny_lcm_folder, **short)


def test_a_checkpoint_of_other_adapters_is_refused(run: FinishedRun, tiny_lcm_folder: str):
    earlier = str(run.run_dir / "checkpoints" / "iteration_000002")
    for other in ({"lora__rank": 3}, {"lora__targets": ["to_q"]}):
        with pytest.raises(ValueError, match=r"lora\.\w+=.* does not go with the checkpoint's .*; keep lora\.\w+="):
            make_trainer(tiny_lcm_folder, run.run_dir, resume=earlier, **other)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bf16_unet_has_float32_adapters_at_every_stage(stage: int, tiny_lcm_folder: str, tmp_path: Path):
    updates = {"update__num_updates": 2, "update__micro_batch_size": 1}  # B starts at zero, so A moves at the second
    more = {**SMALL, **updates, "engine__dtype": "bf16", "engine__zero_stage": stage, "num_iterations": 1}
    trainer = make_trainer(tiny_lcm_folder, tmp_path / "run", **more)
    before = trainer.engine.full_weights()
    trainer.run()
    dtypes = {(".lora_" in name, p.dtype) for name, p in trainer.images.backbone.unet.named_parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    for name, weight in trainer.engine.full_weights().items():
        assert torch.equal(before[name], weight) == (".lora_" not in name), name
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
