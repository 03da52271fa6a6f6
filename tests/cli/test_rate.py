"""`rlcm-fast rate`: a config of train.py with a person in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast.cli.main import main
from rlcm_fast.config import Config, RewardConfig, parse_config
from rlcm_fast.config.files import shipped_configs


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
    said = capsys.readouterr().err
    assert "instead of shapes_alignment_graded" in said
    assert trained[0].update.clip_range == 0.05
    assert "update.clip_range=0.05 instead of 0.0001" in said


def rated_config(tmp_path: Path, **settings: Any) -> list[str]:
    """The options of a config whose rewards a person replaces."""
    (tmp_path / "mine.yaml").write_text(json.dumps({"run_dir": str(tmp_path / "run"), **settings}))
    return ["--config", str(tmp_path / "mine.yaml")]


def lines_said(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """What was printed on stderr, by what each line begins with."""
    return {line.partition("=")[0].partition(":")[0]: line for line in capsys.readouterr().err.splitlines()}


def test_what_belonged_to_the_rewards_is_replaced_with_them(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert rate("--config", "shapes/compressibility", "--run_dir", str(tmp_path)) == 0
    found = trained[0]
    assert (found.prompts.num_prompts, found.prompts.images_per_prompt) == (4, 4)
    assert found.advantages.kind == "group"
    assert (found.rollout.micro_batch_size, found.update.micro_batch_size) == ("auto", "auto")
    said = lines_said(capsys)
    numbers = "you rate 8 to 32 images a round and 2 to 9 of a prompt, not 64 and 4"
    assert said["prompts.num_prompts"] == f"prompts.num_prompts=4 instead of 16: {numbers}"
    assert "instead of prompt" in said["advantages.kind"]
    assert "prompts.images_per_prompt" not in said, "which stays"


def test_a_best_by_a_reward_that_is_replaced_goes_with_it(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    best = "eval/jpeg_compressibility/mean"
    settings = {"rewards": [{"name": "jpeg_compressibility"}], "checkpoint": {"best": best, "export": "best"}}
    assert rate(*rated_config(tmp_path, **settings)) == 0
    assert (trained[0].checkpoint.best, trained[0].checkpoint.export) == ("", "last")
    assert lines_said(capsys)["checkpoint.best"].startswith(f"checkpoint.best='' instead of {best}: ")

    # What is measured for its own sake stays.
    kept = {**settings, "rewards": [{"name": "aesthetic"}], "evaluation": {"rewards": settings["rewards"]}}
    assert rate(*rated_config(tmp_path, **kept)) == 0
    assert (trained[1].checkpoint.best, trained[1].checkpoint.export) == (best, "best")


def test_an_order_of_several_rewards_goes_with_them(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rewards = [{"name": "safety", "threshold": 0.5}, {"name": "jpeg_compressibility"}]
    assert rate(*rated_config(tmp_path, rewards=rewards, rewards_combine="lexicographic")) == 0
    assert trained[0].rewards_combine == "sum"
    assert "instead of lexicographic" in lines_said(capsys)["rewards_combine"]


def test_the_command_has_the_last_word_about_all_that_is_replaced(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--prompts.num_prompts", "16", "--advantages.kind=batch", "--update.micro_batch_size=64"]
    assert rate("--config", "shapes/compressibility", "--run_dir", str(tmp_path), *given) == 0
    found = trained[0]
    assert (found.prompts.num_prompts, found.advantages.kind, found.update.micro_batch_size) == (16, "batch", 64)
    assert not {"prompts.num_prompts", "advantages.kind", "update.micro_batch_size"} & lines_said(capsys).keys()


def test_a_round_that_a_person_can_rate_stays(trained: list[Config], tmp_path: Path):
    prompts = {"num_prompts": 3, "images_per_prompt": 8}
    assert rate(*rated_config(tmp_path, prompts=prompts, advantages={"kind": "leave_one_out"})) == 0
    assert (trained[0].prompts.num_prompts, trained[0].advantages.kind) == (3, "leave_one_out")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"algorithm": {"name": "rebel"}}, "algorithm.name=rebel"),
        ({"update": {"old_log_probs": "recompute"}}, "old_log_probs=recompute"),
    ],
)
def test_what_needs_images_of_the_present_weights_gets_them(
    settings: dict[str, Any], named: str, trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert rate(*rated_config(tmp_path, **settings)) == 0
    assert trained[0].update.rollout_lag == 0
    assert trained[0].update.clip_range == Config().update.clip_range, "no wider than the config has it"
    assert named in lines_said(capsys)["update.rollout_lag"]


def test_nothing_is_announced_that_is_then_refused(
    trained: list[Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert rate(*rated_config(tmp_path, algorithm={"name": "rebel"}), "--update.rollout_lag", "1") == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "algorithm.name=rebel has no clipped ratio" in said.err


@pytest.mark.parametrize("name", [name for name in shipped_configs() if not name.endswith("/joint")])
def test_every_config_that_ships_can_be_rated(name: str, trained: list[Config], tmp_path: Path):
    assert rate("--config", name, "--run_dir", str(tmp_path)) == 0
    prompts = trained[0].prompts
    assert 8 <= prompts.num_prompts * prompts.images_per_prompt <= 32


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
    assert f"goes on with the run in {tmp_path}" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("--prot", "--port"),
        ("--share-on-netwrok", "--share-on-network"),
        ("--update.clip_rang", "--update.clip_range"),
    ],
)
def test_a_word_that_is_nearly_an_option_is_named(
    word: str, meant: str, trained: list[Config], capsys: pytest.CaptureFixture[str]
):
    assert rate("--config", "shapes/rating", word, "3") == 2
    assert f"did you mean {meant}?" in capsys.readouterr().err
    assert trained == []
