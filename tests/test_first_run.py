"""The first run of one's own, docs/your_model_on_24gb.md: its config is guarded, fits 24 GB and trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tiny_runs

from rlcm_fast.cli.main import main as command
from rlcm_fast.config import parse_config
from rlcm_fast.prompts import load_prompts, prompts_for_images
from rlcm_fast.rewards.groups import side_by_side
from rlcm_fast.train import main
from rlcm_fast.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
GUARDED, BARE = "configs/sd15_lcm/full_24gb_guarded.yaml", "configs/sd15_lcm/full_24gb.yaml"
PAGE = ROOT / "docs" / "your_model_on_24gb.md"


@pytest.fixture(autouse=True)
def root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_guarded_config_passes_a_dry_run(capsys: pytest.CaptureFixture[str]):
    assert main(["--config", GUARDED, "--dry_run", "true"]) == 0
    assert "# total_queries: 25600" in capsys.readouterr().out


def test_it_is_the_bare_config_with_an_evaluation_a_kl_term_and_a_second_reward():
    guarded, bare = parse_config(["--config", GUARDED]), parse_config(["--config", BARE])
    same = ("model", "policy", "prompts", "rollout", "advantages", "engine", "num_iterations")
    assert all(getattr(guarded, section) == getattr(bare, section) for section in same)
    assert (bare.evaluation.every, bare.update.kl_weight, len(bare.rewards)) == (0, 0.0, 1)
    assert guarded.evaluation.every > 0
    assert (guarded.update.kl_weight > 0, guarded.update.kl_reference) == (True, "offload")
    assert [reward.name for reward in guarded.rewards] == ["jpeg_compressibility", "diversity"]


def test_its_evaluation_compares_images_of_one_prompt_that_training_never_sees():
    config = parse_config(["--config", GUARDED])
    evaluation, size = config.evaluation, config.rewards[1].group_size
    assert size == config.prompts.images_per_prompt
    prompts = prompts_for_images(load_prompts(evaluation.prompts), evaluation.num_images, evaluation.seed)
    texts = [prompts[place].text for place in side_by_side(prompts)]
    assert all(len(set(texts[first : first + size])) == 1 for first in range(0, len(texts), size))
    assert not set(texts) & {prompt.text for prompt in load_prompts(config.prompts.source)}


@pytest.mark.slow
@pytest.mark.telling
def test_the_plan_of_the_page_is_the_planners(capsys: pytest.CaptureFixture[str]):
    assert command(["plan", "--config", GUARDED, "--gpu", "rtx4090"]) == 0
    said, page = capsys.readouterr().out, PAGE.read_text(encoding="utf-8")
    peaks = re.findall(r"peak of \w+ +[\d.]+", said)
    assert peaks and all(peak in page for peak in peaks)
    fits = re.findall(r"it fits: .*|largest micro-batches .*|seconds per iteration: \d+", said)
    assert len(fits) == 3 and all(line in page for line in fits)


@pytest.mark.usefixtures("one_process")
def test_it_trains_a_small_model_of_its_layout(tiny_lcm_folder: str, tmp_path: Path):
    size = ["--model.image_size=0", "--prompts.num_prompts=2", "--evaluation.num_images=8", "--policy.num_steps=3"]
    run = [f"--run_dir={tmp_path / 'run'}", f"--model.path={tiny_lcm_folder}", "--engine.compile=off"]
    Trainer(parse_config(["--config", GUARDED, "--num_iterations=2", *size, *run])).run()
    lines = tiny_runs.metrics(tmp_path / "run")
    first = lines[0]
    assert first["grad_norm"] > 0
    assert first["advantage/abs_mean"] > 0
    assert lines[1]["kl_to_start"] >= 0
    assert {"eval/diversity", "eval/diversity/mean", "eval/jpeg_compressibility/mean"} <= first.keys()
