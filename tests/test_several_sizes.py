"""Several image sizes in a run (model.image_sizes): each prompt draws one, and everything else follows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
import two_ranks
from diffusers import StableDiffusionXLPipeline
from PIL import Image
from torch import Tensor

from benchmarks.shared import run_processes
from rlcm_fast.algorithms import build_algorithm
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli import plan
from rlcm_fast.cli.main import main as rlcm_fast
from rlcm_fast.config import Config, ModelConfig, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.config.image_sizes import prompts_of_blocks
from rlcm_fast.config.resolved import resolve
from rlcm_fast.grids import captioned_grid
from rlcm_fast.parallel import Turn
from rlcm_fast.planner import of_config
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.planner.estimate import strategy_of
from rlcm_fast.planner.gpus import GPUS
from rlcm_fast.planner.seconds import Planner, Seconds
from rlcm_fast.planner.workload import Workload
from rlcm_fast.stages.image_sizes import ImageSizes
from rlcm_fast.stages.rollout import Rollout
from rlcm_fast.stages.selection import Selection
from rlcm_fast.stages.task_gradients import TaskGradients
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Conditioning, MixedTrajectory, Prompt, Trajectory, by_size, micro_batches

pytestmark = pytest.mark.usefixtures("one_process")
HIGH, SMALL, LARGE = (24, 16), (16, 16), (24, 24)  # pixels
SIZES = [list(HIGH), list(SMALL)]


def make_config(model: str, run_dir: Path, **settings: Any) -> Config:
    """settings: with __ for the dots."""
    named = {"model.image_sizes": SIZES, **{name.replace("__", "."): value for name, value in settings.items()}}
    config = parse_config(tiny_runs.arguments(model, run_dir, named))
    validate(config, 1)
    return config


def drawn(trainer: Trainer, iteration: int = 0) -> tuple[Rollout, Turn]:
    """The rollout of a turn after the first, which measures no noise of the ratio."""
    turn = Turn(iteration, seed=trainer.config.seed)
    return trainer.collector.rollout(trainer.tasks.next_batch(["default"]), turn), turn


@pytest.fixture(scope="module", params=["lcm", "sd", "sdxl"])
def trainer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    folder = request.getfixturevalue(f"tiny_{request.param}_folder")
    settings = {"prompts__num_prompts": 4, "update__micro_batch_size": 4, "update__num_updates": 1}
    kind = {} if request.param == "lcm" else {"policy__kind": "ddim", "policy__guidance_scale": 2.0}
    return Trainer(make_config(folder, tmp_path_factory.mktemp("run"), **settings, **kind))


def test_all_images_of_a_prompt_have_one_size_and_rewards_see_uniform_batches(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[tuple[int, ...], list[str]]] = []
    submit = trainer.tasks.rewards.submit

    def noted(images: Tensor, prompts: list[Prompt]) -> None:
        seen.append((tuple(images.shape[2:]), [prompt.text for prompt in prompts]))
        submit(images, prompts)

    monkeypatch.setattr(trainer.tasks.rewards, "submit", noted)
    batch, _ = drawn(trainer)
    assert [text for _, texts in seen for text in texts] == [prompt.text for prompt in batch.prompts]
    sizes = {text: {size for size, texts in seen if text in texts} for _, texts in seen for text in texts}
    assert sorted(size for of_text in sizes.values() for size in of_text) == [SMALL, SMALL, HIGH, HIGH]
    trajectory = batch.trajectory
    assert isinstance(trajectory, MixedTrajectory)
    by_sample = [{0: trajectory.parts[0], 1: trajectory.parts[1]}[size] for size in trajectory.size_of.tolist()]
    shapes = [size for size, texts in seen for _ in texts]
    assert [tuple(part.latents.shape[3:]) for part in by_sample] == [(high // 2, wide // 2) for high, wide in shapes]


def test_the_ratio_is_one_before_the_first_update_at_every_size(trainer: Trainer):
    batch, turn = drawn(trainer)
    generator = torch.Generator().manual_seed(0)
    assert trainer.updater.ratio_noise(batch.trajectory, generator) < 1e-6
    weights = torch.tensor([1.0, -1.0] * 4)
    metrics = trainer.updater.update(batch.trajectory, weights, turn)
    assert abs(metrics.ratio_mean.item() - 1) < 1e-6 and metrics.ratio_max_deviation.item() < 1e-5
    assert metrics.grad_norm > 0


def test_the_gradient_is_the_weighted_sum_of_each_sizes_own(tiny_sdxl_folder: str, tmp_path: Path):
    """A size with twice the transitions weighs twice as much; pixels do not count."""
    settings = {"policy__kind": "ddim", "prompts__num_prompts": 3, "update__num_updates": 1}
    trainer = Trainer(make_config(tiny_sdxl_folder, tmp_path, **settings, update__micro_batch_size=3))
    trajectory, config = drawn(trainer)[0].trajectory, trainer.config
    assert isinstance(trajectory, MixedTrajectory)
    policy = trainer.images.policy
    policy.unet = trainer.images.backbone.unet
    measure = TaskGradients(policy, build_algorithm(config.algorithm, config.update), config.update, 1, 1)
    weights = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0, 0.75])

    def gradient(of: Any, of_samples: Tensor) -> Tensor:
        tasks = ["default"] * len(of_samples)
        found = measure.by_task(of, of_samples, tasks, torch.Generator().manual_seed(0))["default"]
        return torch.cat([part.double().flatten() for part in found])

    whole, shares = gradient(trajectory, weights), [len(samples) / 6 for samples in trajectory.samples]
    own = [gradient(*pair) for pair in zip(trajectory.parts, [weights[s] for s in trajectory.samples], strict=True)]
    assert sorted(shares) == [1 / 3, 2 / 3]
    summed = shares[0] * own[0] + shares[1] * own[1]
    assert (whole - summed).norm() < 1e-5 * whole.norm()
    assert (whole - own[0]).norm() > 0.1 * whole.norm()


def test_an_update_takes_the_same_step_whatever_its_micro_batches(tiny_lcm_folder: str, tmp_path: Path):
    stepped = []
    for size in (12, 2):
        settings = {"prompts__num_prompts": 3, "update__num_updates": 1, "update__kl_weight": 0.1}
        options = {"update__micro_batch_size": size, "optimizer__eps": 1.0, "optimizer__lr": 1.0}
        trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / str(size), **settings, **options))
        batch, turn = drawn(trainer, iteration=1)
        trainer.updater.update(batch.trajectory, torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0, 0.75]), turn)
        stepped.append(trainer.engine.full_weights())
    largest = max((stepped[0][name] - weight).abs().max().item() for name, weight in stepped[1].items())
    assert largest < 1e-6


ONE = {"source": "shapes:one", "rewards": [{"name": tiny_runs.REWARD}]}
TASKS = {"tasks": [{"name": name, **ONE} for name in "ab"], "prompts__source": "shapes:one", "rewards": []}


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm__name": "rebel", "prompts__num_prompts": 4},
        {**TASKS, "prompts__num_prompts": 4, "rollout__shared_noise": True},
        {"update__num_passes": 2, "update__old_log_probs": "recompute", "update__order": "by_step"},
    ],
    ids=["pairs", "tasks", "recomputed by step"],
)
def test_an_iteration_trains(tiny_lcm_folder: str, tmp_path: Path, settings: dict[str, Any]):
    line = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", **settings)).train(0)
    assert line["grad_norm"] > 0 and line["skipped_updates"] == 0 and line["ratio/noise_floor"] < 1e-6


def test_sdxl_is_told_each_size_as_stock_diffusers_tells_it(tiny_sdxl_folder: str):
    backbone = Backbone.load(
        ModelConfig(tiny_sdxl_folder, image_sizes=SIZES), torch.device("cpu"), torch.float32, "ddim"
    )
    stock: Any = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl_folder)
    conditioning = backbone.encode([Prompt("a star")], with_negative=False)
    assert backbone.image_size == HIGH
    for size in (HIGH, SMALL):
        sized = backbone.sized(conditioning, size)
        assert sized.time_ids is not None
        assert torch.equal(sized.time_ids, stock._get_add_time_ids(size, (0, 0), size, torch.float32, 12))
        assert sized.latent_size == (size[0] // 2, size[1] // 2)


def test_a_resumed_run_is_bitwise_the_same(tiny_lcm_folder: str, tmp_path: Path):
    settings = {"num_iterations": 2, "checkpoint__every": 1, "evaluation__every": 1, "tracking__grid_every": 2}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    Trainer(make_config(tiny_lcm_folder, whole, **settings)).run()
    shutil.copytree(whole, resumed)
    for last in ("checkpoints/iteration_000002", "export"):
        shutil.rmtree(resumed / last)
    Trainer(make_config(tiny_lcm_folder, resumed, **settings, resume="latest")).run()
    lines = tiny_runs.metrics(whole)
    assert tiny_runs.metrics(resumed) == lines and len(lines) == 3
    unet = "export/unet/diffusion_pytorch_model.safetensors"
    assert (whole / unet).read_bytes() == (resumed / unet).read_bytes()
    assert json.loads((whole / "export/unet/config.json").read_text())["sample_size"] == [12, 8]

    # Evaluations say what each size scores.
    name = f"eval/{tiny_runs.REWARD}"
    means = [lines[0][f"{name}/{size}/mean"] for size in ("24x16", "16x16")]
    assert lines[0][f"{name}/mean"] == pytest.approx((2 * means[0] + means[1]) / 3)
    assert Image.open(whole / "grids" / "000002.png").height > 128 * 24 / 16


@pytest.mark.slow  # it starts processes
def test_processes_make_as_many_passes_of_the_same_sizes(tiny_lcm_folder: str, tmp_path: Path):
    settings: dict[str, object] = {"model.image_sizes": SIZES, "prompts.num_prompts": 4, "optimizer.eps": 1e-3}
    settings |= {"num_iterations": 2, "evaluation.every": 2, "tracking.grid_every": 2}
    silent = {"rewards": [{"name": "two_ranks:HighOnRank1"}], "advantages.kind": "group", "engine.zero_stage": 3}
    runs = {f"stage_{stage}": {**settings, "engine.zero_stage": stage} for stage in (0, 3)}
    target = (two_ranks.run_sizes, tiny_lcm_folder, tmp_path, {**runs, "silent": {**settings, **silent}})
    group = (2, run_processes.free_port())
    processes = [run_processes.start(*target, log=tmp_path / f"{rank}.log", rank=rank, group=group) for rank in (0, 1)]
    for rank, process in enumerate(processes):
        process.join(timeout=300)
        assert process.exitcode == 0, (tmp_path / f"{rank}.log").read_text()[-3000:]
    seen = {name: [torch.load(tmp_path / f"{name}_{rank}.pt") for rank in (0, 1)] for name in (*runs, "silent")}
    for ranks in seen.values():
        assert ranks[0]["sizes"] == ranks[1]["sizes"]
    whole, shared = (seen[name][0]["weights"] for name in runs)
    assert max((whole[name] - shared[name]).abs().max().item() for name in whole) < 1e-5
    assert tiny_runs.metrics(tmp_path / "silent")[0]["skipped_transitions"] == 0.5  # one size, on both


def test_every_update_takes_its_share_of_every_size():
    counts = [0, 0]
    lengths = torch.tensor([4, 2])
    parts = [Trajectory(torch.zeros(n, 3, 1, n, 1), torch.rand(n, 2), _no_text(n)) for n in lengths.tolist()]
    trajectory = MixedTrajectory(parts, [torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3])])
    config = parse_config(["--update.num_updates", "4"]).update
    updates = Selection(trajectory, config, 1, torch.Generator().manual_seed(0)).one_pass()
    assert torch.cat([part.rows for part in updates]).sort().values.tolist() == list(range(12))
    for update in updates:
        places = by_size(trajectory, update.rows)
        assert {size: len(of_size) for size, of_size in places.items()} == {0: 2, 1: 1}
        for batch in micro_batches(trajectory, update.rows, 2):
            taken = trajectory.transitions(update.rows[batch])
            counts[0 if taken.x_t.shape[2] == 4 else 1] += len(batch)
            log_probs = trajectory.log_probs[taken.sample, taken.step]
            assert torch.equal(taken.log_prob_old, log_probs)
    assert counts == [8, 4]
    doubled = trajectory.with_log_probs(2 * trajectory.log_probs)
    assert torch.equal(doubled.log_probs, 2 * trajectory.log_probs)


def _no_text(count: int) -> Any:
    return Conditioning(torch.zeros(1, 1, 1), torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize(
    ("num_prompts", "num_sizes", "blocks"), [(4, 2, [2, 2]), (4, 3, [2, 1, 1]), (5, 3, [2, 2, 1]), (1, 3, [1])]
)
def test_prompts_divide_as_equally_as_whole_prompts_allow(num_prompts: int, num_sizes: int, blocks: list[int]):
    assert prompts_of_blocks(num_prompts, num_sizes) == blocks


def test_sizes_are_drawn_equally_often_and_depend_on_seed_and_iteration_alone(tiny_lcm_folder: str, tmp_path: Path):
    sizes = ImageSizes.of(resolve(make_config(tiny_lcm_folder, tmp_path, prompts__num_prompts=1), 1))
    first = [sizes.runs(2, Turn(iteration, seed=3))[0].size for iteration in range(100)]
    assert first == [sizes.runs(2, Turn(iteration, seed=3))[0].size for iteration in range(100)]
    assert 35 < first.count(HIGH) < 65


def test_cells_of_a_grid_hold_the_largest_image():
    images = [torch.zeros(3, 64, 128), torch.zeros(3, 128, 64)]
    grid = captioned_grid(images, ["wide", "high"], columns=2)
    assert grid.width == 2 * (128 + 6) + 6
    assert grid.getpixel((6 + 1, 6 + 32 + 1)) == (0, 0, 0) and grid.getpixel((6 + 1, 6 + 30)) == (255, 255, 255)
    assert grid.getpixel((6 + 134 + 33, 6 + 1)) == (0, 0, 0) and grid.getpixel((6 + 134 + 30, 6 + 1)) == (255, 255, 255)


@pytest.mark.slow  # it traces two networks
def test_the_plan_has_the_memory_of_the_largest_size_and_the_mean_of_the_seconds(tiny_sdxl_folder: str):
    sizes = [(64, 32), (64, 64)]
    run = resolve(parse_config(["--model.image_sizes", json.dumps(sizes)]), 1)
    planner = Planner(load_architecture(tiny_sdxl_folder), Workload.of(run), sizes=sizes)
    strategy = strategy_of(run.config, of_config._largest(sizes))
    of_one = [planner._seconds(replace(strategy, image_size=size), GPUS["h100"]) for size in sizes]
    seconds = planner.seconds(strategy, GPUS["h100"])
    for stage in ("sampling", "decoding", "update", "step", "iteration"):
        assert getattr(seconds, stage) == pytest.approx(sum(getattr(one, stage) for one in of_one) / 2)
    peaks = [planner.memory(replace(strategy, image_size=size)).peak for size in sizes]
    assert planner.memory(strategy).peak == peaks[1] > peaks[0]
    said = " ".join(plan._head(planner, [plan._OnGpu(GPUS["h100"], run.config, strategy)], "tiny"))
    assert "images of 64 x 32, 64 x 64 pixels" in said and "bytes and GFLOP are those of the largest" in said


def test_the_plan_takes_the_mean_of_the_seconds(tiny_sdxl_folder: str, monkeypatch: pytest.MonkeyPatch):
    pixels = {(64, 32): 2.0, (64, 64): 4.0}
    alike = lambda _, strategy, gpu: Seconds(*[pixels[strategy.image_size]] * 4)  # noqa: E731
    monkeypatch.setattr(Planner, "_seconds", alike)
    run = resolve(parse_config(["--model.image_sizes", json.dumps(list(pixels))]), 1)
    planner = Planner(load_architecture(tiny_sdxl_folder), Workload.of(run), sizes=list(pixels))
    assert planner.seconds(strategy_of(run.config), GPUS["h100"]) == Seconds(3.0, 3.0, 3.0, 3.0)
    assert Workload.of(run).num_image_sizes == 2 and of_config._largest(list(pixels)) == (64, 64)


def test_the_micro_batches_that_an_update_may_have_are_counted_for_the_engine(tiny_lcm_folder: str, tmp_path: Path):
    whole = make_config(tiny_lcm_folder, tmp_path, update__num_updates=1, update__micro_batch_size=8)
    assert resolve(whole, 1).sizes.micro_batches_per_update_and_process == 2  # one of each size
    odd = make_config(tiny_lcm_folder, tmp_path, prompts__num_prompts=3, update__micro_batch_size=6)
    assert resolve(odd, 1).sizes.micro_batches_per_update_and_process == 2  # 4 and 2 of the 6 transitions


@pytest.mark.parametrize("command", ["sample", "evaluate"])
def test_commands_draw_the_size_that_they_are_given(
    tiny_lcm_folder: str, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / ("grid.png" if command == "sample" else "scores.json")
    what = ["--prompt", "a star", "--num-images", "1"] if command == "sample" else ["--rewards", "jpeg_compressibility"]
    few = ["--num-images", "2", "--num-steps", "1", "--model", tiny_lcm_folder, "--out", str(out)]
    assert rlcm_fast([command, *what, *few, "--size", "32x16"]) == 0
    if command == "sample":
        assert Image.open(out).height > 128 * 32 / 16
    else:
        assert json.loads(out.read_text())["size"] == [32, 16]
    assert rlcm_fast([command, *what, *few, "--size", "33x16"]) == 2
    assert "size=33x16 must divide by 2; try 32x16" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        rlcm_fast([command, *what, *few, "--size", "33"])
    assert "33 is no size: give height x width in pixels, as 1216x832" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model__image_sizes": [[16]]}, r"model.image_sizes\[0\]=\[16\] is no \[height, width\]"),
        (
            {"model__image_sizes": [[16, 0]]},
            r"model.image_sizes\[0\]\[1\]=0 is out of range; give \[height, width\] in",
        ),
        ({"model__image_sizes": [[16, 16], [16, 16]]}, r"model.image_sizes\[1\]=\[16, 16\] is there twice"),
        ({"model__image_sizes": [[8 * n, 8] for n in range(1, 8)]}, r"are 7 sizes; give at most 6"),
        ({"model__image_size": 16}, r"model.image_size=16 beside model.image_sizes=\[\[24, 16\], \[16, 16\]\]"),
        ({"pretraining__weight": 0.1, "pretraining__data": "shapes:all"}, r"pretraining.weight=0.1 reads real images"),
        (
            {"engine__optimizer_in_backward": True, "engine__dtype": "pure_bf16", "optimizer__name": "adamw_8bit"},
            "engine.optimizer_in_backward=true has one micro-batch",
        ),
    ],
)
def test_sizes_that_cannot_work_are_refused(tiny_lcm_folder: str, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        make_config(tiny_lcm_folder, Path("run"), **settings)


def test_a_size_that_the_unet_cannot_halve_is_named(tiny_lcm_folder: str):
    model = ModelConfig(tiny_lcm_folder, image_sizes=[[16, 16], [18, 16]])
    with pytest.raises(ValueError, match=r"model.image_sizes\[1\]=\[18, 16\] must divide by 4; try \[16, 16\]"):
        Backbone.load(model, torch.device("cpu"), torch.float32, "consistency")
