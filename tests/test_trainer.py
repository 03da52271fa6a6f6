"""A whole run on a tiny pipeline: what it logs, what it leaves, what stops it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from PIL import Image
from safetensors.torch import load_file

from rlcm_fast import parallel
from rlcm_fast.algorithms import build_algorithm
from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import for_cpu
from rlcm_fast.engine.tensor_files import write_tensors
from rlcm_fast.engine.zero import ZeroEngine
from rlcm_fast.rewards import RewardError
from rlcm_fast.stages.update import Updater
from rlcm_fast.train import main
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")
REWARDS = (tiny_runs.REWARD, "jpeg_compressibility")
EVERY_LINE = {
    "iteration",
    "queries",
    *(f"reward/{name}/{statistic}" for name in (*REWARDS, "total") for statistic in ("mean", "std")),
    "advantage/abs_mean",
    *(f"advantage/{name}/{statistic}" for name in REWARDS for statistic in ("abs_mean", "correlation")),
    "ratio/mean",
    "ratio/max_deviation",
    "clip_fraction",
    "approx_kl",
    "kl_to_start",
    "skipped_transitions",
    "skipped_updates",
    "loss",
    "grad_norm",
    "lr",
    "seconds/rollout",
    "seconds/reward_wait",
    "seconds/update",
    "seconds/iteration",
    "images_per_second",
}
EVALUATION = {f"eval/{name}/{statistic}" for name in REWARDS for statistic in ("mean", "std")} | {"eval/diversity"}


@dataclass(frozen=True)
class FinishedRun:
    config: Config
    trainer: Trainer
    run_dir: Path
    encoded: list[tuple[int, ...]]  # token ids of every text that went through the text encoder
    said: str


def make_config(model: str, run_dir: Path, **settings: object) -> Config:
    """settings: with __ for the dots."""
    return parse_config(tiny_runs.arguments(model, run_dir, {k.replace("__", "."): v for k, v in settings.items()}))


@pytest.fixture(scope="module")
def run(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FinishedRun]:
    run_dir = tmp_path_factory.mktemp("trainer") / "run"
    config = make_config(
        tiny_lcm_folder,
        run_dir,
        rewards=[{"name": tiny_runs.REWARD}, {"name": "jpeg_compressibility", "weight": 0.5}],
        update__kl_weight=0.1,
        evaluation__every=2,
        checkpoint__every=1,
        tracking__grid_every=2,
        tracking__tensorboard=True,
    )
    trainer = Trainer(config)
    encoded: list[tuple[int, ...]] = []
    text_encoder = trainer.images.backbone._pipeline.text_encoder
    text_encoder.register_forward_pre_hook(lambda _, inputs: encoded.extend(map(tuple, inputs[0].tolist())))
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.tracker, "say", said.append)
        trainer.run()
    return FinishedRun(config, trainer, run_dir, encoded, "\n".join(said))  # type: ignore[return-value]


def test_every_line_has_all_keys_and_finite_numbers(run: FinishedRun):
    lines = tiny_runs.metrics(run.run_dir, with_times=True)
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert [line["queries"] for line in lines] == [4, 8, 12, 12]
    assert lines[0].keys() == EVERY_LINE | EVALUATION | {"ratio/noise_floor"}
    assert lines[1].keys() == EVERY_LINE
    assert lines[2].keys() == EVERY_LINE | EVALUATION
    assert all(torch.isfinite(torch.tensor(list(line.values()))).all() for line in lines)
    assert all(line["seconds/iteration"] >= line["seconds/rollout"] + line["seconds/update"] for line in lines[:3])


def test_the_final_weights_are_evaluated_whatever_the_interval(run: FinishedRun):
    assert tiny_runs.metrics(run.run_dir)[3].keys() == {"iteration", "queries"} | EVALUATION


def test_before_the_first_update_all_ratios_are_one(run: FinishedRun):
    first = tiny_runs.metrics(run.run_dir)[0]
    assert 0 <= first["ratio/noise_floor"] < 1e-6
    assert "warning" not in run.said


def test_the_learning_rate_and_the_kl_term_go_their_way(run: FinishedRun):
    lines = tiny_runs.metrics(run.run_dir)[:3]
    falling = [1 - 0.9 * update / 6 for update in (0, 2, 4)]  # 6 updates in all, 2 an iteration, logged before them
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 / 3, 1e-3 * falling[1], 1e-3 * falling[2]])
    assert 0 < lines[0]["kl_to_start"] < lines[1]["kl_to_start"] < lines[2]["kl_to_start"]


def test_each_distinct_prompt_is_encoded_once(run: FinishedRun):
    before = 1  # the check of weights, while the run was built
    assert len(run.encoded) == len(set(run.encoded)) == len(tiny_runs.PROMPTS) - before


def test_the_run_folder_holds_config_environment_events_and_grids(run: FinishedRun):
    assert parse_config(["--config", str(run.run_dir / "config.yaml")]) == for_cpu(run.config)
    assert json.loads((run.run_dir / "environment.json").read_text())["packages"]["deepspeed"]
    assert list((run.run_dir / "events").glob("events.out.tfevents.*"))
    grids = sorted((run.run_dir / "grids").iterdir())
    assert [grid.name for grid in grids] == ["000000.png", "000002.png", "000003.png"]
    assert Image.open(grids[0]).size == Image.open(grids[-1]).size


def test_the_last_checkpoints_are_kept_and_hold_the_final_weights(run: FinishedRun):
    folders = sorted((run.run_dir / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["iteration_000002", "iteration_000003"]
    saved = load_file(folders[-1] / "unet.safetensors")
    weights = run.trainer.engine.full_weights()
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)


def test_the_export_is_a_stock_pipeline_that_draws_the_policys_image(run: FinishedRun):
    from diffusers import LatentConsistencyModelPipeline

    pipeline = LatentConsistencyModelPipeline.from_pretrained(run.run_dir / "export", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        "a red circle",
        num_inference_steps=run.config.policy.num_steps,
        guidance_scale=run.config.policy.guidance_scale,
        generator=torch.Generator().manual_seed(5),
        output_type="pt",
    ).images  # type: ignore[union-attr]
    conditioning = run.trainer.images.encode([Prompt("a red circle")])
    _, x_0 = run.trainer.images.policy.sample(conditioning, torch.Generator().manual_seed(5))
    torch.testing.assert_close(run.trainer.images.backbone.decode(x_0), expected, atol=1e-5, rtol=0)
    start = pipeline.unet.load_state_dict(run.trainer.engine.full_weights())
    assert not start.missing_keys and not start.unexpected_keys


def test_a_run_folder_is_not_written_over(run: FinishedRun):
    before = (run.run_dir / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run; go on with --resume latest, or give another --run_dir"):
        Trainer(run.config)
    assert (run.run_dir / "metrics.jsonl").read_bytes() == before


def say_of_noise(noise: float, updater: Updater, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `check_ratio` says where rounding moves the ratio by `noise`."""
    said: list[str] = []
    monkeypatch.setattr(updater, "ratio_noise", lambda *_: noise)
    unused: Any = None
    assert updater.check_ratio(unused, parallel.Turn(0), said.append) == {"ratio/noise_floor": noise}
    return said


def test_a_clip_range_below_the_rounding_is_warned_of(run: FinishedRun, monkeypatch: pytest.MonkeyPatch):
    (said,) = say_of_noise(0.02, run.trainer.updater, monkeypatch)
    assert "rounding alone moves the ratio by 2.0e-02, as much as update.clip_range=0.01" in said
    assert "set update.old_log_probs=recompute or engine.dtype=fp32" in said
    assert say_of_noise(0.0075, run.trainer.updater, monkeypatch) == []


@pytest.mark.parametrize("settings", [{"update__num_updates": 1}, {"algorithm__name": "rwr"}])
def test_rounding_that_no_clip_can_act_on_is_not_warned_of(
    settings: dict[str, object], run: FinishedRun, tiny_lcm_folder: str, monkeypatch: pytest.MonkeyPatch
):
    config = make_config(tiny_lcm_folder, run.run_dir, **settings)
    algorithm = build_algorithm(config.algorithm, config.update)
    updater = replace(run.trainer.updater, algorithm=algorithm, config=config.update)
    assert say_of_noise(0.02, updater, monkeypatch) == []


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_runs_and_its_noise_floor_is_logged(stage: int, tiny_lcm_folder: str, tmp_path: Path):
    settings = {"engine__dtype": "bf16", "engine__zero_stage": stage, "num_iterations": 1}
    trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", **settings))
    before = trainer.engine.full_weights()
    trainer.run()
    (line,) = tiny_runs.metrics(tmp_path / "run")
    assert 0 <= line["ratio/noise_floor"] < 0.1
    assert line["grad_norm"] > 0
    after = load_file(tmp_path / "run" / "checkpoints" / "iteration_000001" / "unet.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_the_leanest_settings_train_together(tiny_lcm_folder: str, tmp_path: Path):
    settings = {
        "engine__dtype": "pure_bf16",
        "engine__optimizer_in_backward": True,
        "engine__recompute": "selective",
        "engine__channels_last": True,
        "optimizer__name": "adamw_8bit",
        "update__micro_batch_size": 4,
        "update__kl_weight": 0.1,
        "num_iterations": 2,
        "tracking__grid_every": 1,
    }
    trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", **settings))
    trainer.run()
    lines = tiny_runs.metrics(tmp_path / "run")
    assert all(0 < line["lost_updates"] < 1 and line["grad_norm"] > 0 for line in lines)
    assert 0 < lines[0]["kl_to_start"] < lines[1]["kl_to_start"]
    assert trainer.updater.start_model is not None
    for weight in (*trainer.images.backbone.unet.parameters(), *trainer.updater.start_model.policy.unet.parameters()):
        assert weight.dtype == torch.bfloat16 and weight.grad is None
        assert weight.ndim < 4 or weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["regional", "whole"])
def test_a_compiled_network_keeps_the_ratio_at_one_and_learns_the_same(
    kind: str, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Its graphs with gradients (update) and without (rollout) round differently, in float32 far below a clip range.

    Whole it takes minutes to compile, unless torch has the graphs in its cache.
    """
    lines = []
    settings = {"num_iterations": 2, "optimizer__eps": 1e-3}  # a small eps blows up rounding of gradients that are zero
    for compile_ in ("off", kind):
        trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / compile_, engine__compile=compile_, **settings))
        trainer.run()
        lines.append(tiny_runs.metrics(tmp_path / compile_))
    assert lines[1][0]["ratio/noise_floor"] < 1e-5
    for eager, compiled in zip(*lines, strict=True):
        assert compiled == pytest.approx(eager, rel=1e-2, abs=1e-5)
    assert (kind == "whole") == ("the gradients of all 209 trained weights equal" in capsys.readouterr().err)


@pytest.mark.parametrize(
    "fault, problem",
    [
        ("nan", "returned nan for image 1 of its micro-batch; scores must be finite"),
        ("inf", "returned inf for image 1"),
        ("shape", r"of shape \(2, 1\); return torch.float32 of shape \(2,\)"),
        ("exception", "raised OSError: the reward model is gone"),
    ],
)
def test_a_failing_reward_stops_the_run_and_the_last_checkpoint_stays_good(
    fault: str, problem: str, tiny_lcm_folder: str, tmp_path: Path
):
    # It is tried at the start, and has two micro-batches an iteration: the fifth call is the second of iteration 1.
    reward = {"name": "plugin_rewards:Faulty", "arguments": {"fault": fault, "good_calls": 4}}
    settings = {"rewards": [reward], "rollout__reward_workers": 1, "checkpoint__every": 1}
    config = make_config(tiny_lcm_folder, tmp_path / "run", **settings)
    trainer = Trainer(config)
    with pytest.raises(RewardError, match=f"reward 'plugin_rewards:Faulty', prompt '.*', iteration 1: .*{problem}"):
        trainer.run()
    weights = trainer.engine.full_weights()
    resumed = Trainer(replace(config, resume="latest"))
    resumed.tracker.close()
    assert (resumed.iteration, resumed.queries) == (1, 4)
    assert all(torch.equal(value, weights[name]) for name, value in resumed.engine.full_weights().items())


@pytest.mark.parametrize("algorithm", ["ppo", "rebel"])
def test_a_reward_that_may_fail_costs_its_images_alone(algorithm: str, tiny_lcm_folder: str, tmp_path: Path):
    reward = {"name": "plugin_rewards:Unreachable", "arguments": {"call": 4}, "on_failure": "skip"}  # 0: at the start
    watched = {"evaluation__rewards": [{**reward, "name": "plugin_rewards:Slow", "arguments": {"seconds": 0}}]}
    settings = {"rewards": [reward], "algorithm__name": algorithm, "update__num_updates": 1, "evaluation__every": 3}
    settings |= {"rollout__reward_workers": 1}
    trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", **settings, **watched))
    trainer.run()
    lines = tiny_runs.metrics(tmp_path / "run")
    assert [line["skipped_images"] for line in lines[:3]] == [0, 1, 0]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    out = 2 if algorithm == "rebel" else 1  # of four images; rebel leaves out the pair
    assert lines[1]["skipped_transitions"] >= out / 4
    assert lines[0]["eval/plugin_rewards:Unreachable/skipped"] == lines[0]["eval/plugin_rewards:Slow/skipped"] == 0


def test_a_full_disk_stops_the_run_with_one_line_and_the_last_checkpoint_stays_good(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    arguments = tiny_runs.arguments(tiny_lcm_folder, run_dir, {"checkpoint.every": 1})
    save, saved = ZeroEngine.save, []

    def save_until_full(engine: ZeroEngine, folder: Path) -> None:
        save(engine, folder)
        saved.append(folder)
        if len(saved) == 2:
            write_tensors(Path("/dev/full"), {"weight": torch.zeros(100_000)})

    with monkeypatch.context() as patch:
        patch.setattr(ZeroEngine, "save", save_until_full)
        assert main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: run_dir={run_dir} is on a full disk") and "--resume latest" in error
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["iteration_000001"]
    assert main([*arguments, "--resume", "latest"]) == 0
    assert [line["iteration"] for line in tiny_runs.metrics(run_dir)] == [0, 1, 2]
