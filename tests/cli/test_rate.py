"""`rlcm-fast rate`: a config of train.py with a person in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast.cli.main import main
from rlcm_fast.config import Config, RewardConfig, parse_config


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configs that training is started with."""
    found: list[Config] = []

    def train(options: list[str]) -> int:
        found.append(parse_config(options))
        return 0

    monkeypatch.setattr("rlcm_fast.train.main", train)
    return found


def rate(*options: str) -> int:
    return main(["rate", *options])


def test_you_rate_instead_of_the_configs_rewards_one_round_ahead(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert rate("--config", "shapes/alignment", "--port", "0", "--run_dir", str(tmp_path)) == 0
    assert trained[0].rewards == [RewardConfig("human", arguments={"port": 0})]
    assert trained[0].update.rollout_lag == 1
    assert trained[0].update.kl_weight == 0.04, "the config's own settings stay"
    said = capsys.readouterr().out
    assert "instead of shapes_alignment_graded" in said
    assert trained[0].update.clip_range == 0.05
    assert "update.clip_range=0.05 instead of 0.0001" in said


def test_a_clip_that_the_command_gives_stays(trained: list[Config], tmp_path: Path):
    assert rate("--config", "shapes/alignment", "--run_dir", str(tmp_path), "--update.clip_range", "2e-4") == 0
    assert trained[0].update.clip_range == 2e-4


def test_a_config_that_names_the_person_keeps_its_other_rewards_and_settings(trained: list[Config], tmp_path: Path):
    file = tmp_path / "mine.yaml"
    rewards = [{"name": "human", "arguments": {"comparisons": 4}}, {"name": "safety", "weight": 2.0}]
    file.write_text(json.dumps({"rewards": rewards, "update": {"rollout_lag": 0}}))
    assert rate("--config", str(file), "--share-on-network", "--seed", "5") == 0
    found = trained[0]
    assert found.rewards[0].arguments == {"comparisons": 4, "share_on_network": True}
    assert (found.rewards[1].name, found.rewards[1].weight) == ("safety", 2.0)
    assert (found.update.rollout_lag, found.seed) == (0, 5)


def test_the_same_command_goes_on_with_a_run_that_has_a_checkpoint(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "checkpoints/iteration_000001").mkdir(parents=True)
    assert rate("--config", "shapes/rating", "--run_dir", str(tmp_path)) == 0
    assert trained[0].resume == "latest"
    assert f"goes on with the run in {tmp_path}" in capsys.readouterr().out


def test_tasks_must_name_the_person_themselves(trained: list[Config], capsys: pytest.CaptureFixture[str]):
    assert rate("--config", "shapes/joint") == 2
    assert "no task has the reward human" in capsys.readouterr().err
    assert trained == []


@pytest.mark.parametrize(
    ("settings", "num_processes", "problem"),
    [
        (
            {"prompts.images_per_prompt": 1, "update.micro_batch_size": 12, "advantages.kind": "batch"},
            1,
            "nothing to compare an image with",
        ),
        ({"update.micro_batch_size": 24}, 2, "needs one process"),
        ({"evaluation.rewards": '[{"name": "human"}]'}, 1, "put it into rewards"),
    ],
)
def test_what_a_person_cannot_do_is_refused(settings: dict[str, Any], num_processes: int, problem: str):
    from rlcm_fast.config.checks import validate

    options = ["--config", "shapes/rating", *(f"--{name}={value}" for name, value in settings.items())]
    with pytest.raises(ValueError, match=problem):
        validate(parse_config(options), num_processes)
