"""The README's reward is a reward, and its commands name options, keys and files that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found.group(1)


def test_the_reward_of_the_readme_can_be_named_and_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from rlcm_fast.config import parse_config
    from rlcm_fast.rewards import build_reward, check_scores
    from rlcm_fast.trajectory import Prompt

    (tmp_path / "my_rewards.py").write_text(block("python"))
    (tmp_path / "my_config.yaml").write_text(block("yaml"))
    monkeypatch.syspath_prepend(str(tmp_path))
    first, second = parse_config(["--config", str(tmp_path / "my_config.yaml")]).rewards
    reward = build_reward(first.name, first.arguments)
    build_reward(second.name, second.arguments)
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0], images[1, 1] = 1.0, 1.0  # red, green
    prompts = [Prompt("a red circle"), Prompt("a green circle")]
    assert check_scores(first.name, reward(images, prompts), prompts, iteration=0).tolist() == [2.0, -1.0]


def test_the_set_reward_of_the_readme_is_told_by_its_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from rlcm_fast.config import parse_config
    from rlcm_fast.rewards import build_rewards
    from rlcm_fast.trajectory import Prompt

    code = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "def describe" in code)
    config = next(text for text in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "leave_one_out" in text)
    (tmp_path / "my_set_rewards.py").write_text(code)
    (tmp_path / "my_config.yaml").write_text(config)
    monkeypatch.syspath_prepend(str(tmp_path))
    rewards = build_rewards(parse_config(["--config", str(tmp_path / "my_config.yaml")]).rewards)
    spread, _ = rewards.pop("my_set_rewards:Contrast")
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).repeat(4)[:, None, None, None].expand(16, 3, 8, 8)
    values = spread(images, [Prompt("a circle")] * 16)
    assert values[0] > 0 > values[2]  # without it the group is less spread out, or more
    (parity, weight) = rewards["distribution_parity"]
    assert (weight, parity(torch.full((16, 3, 64, 64), 0.5), [Prompt("a circle")] * 16).max()) == (16.0, 0.0)


def test_the_kernels_of_the_readme_run_in_another_trainer(capsys: pytest.CaptureFixture[str]):
    example = next(code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "policy_loss" in code)
    scope: dict[str, Any] = {}
    exec(example, scope)  # noqa: S102
    assert scope["m"].grad.abs().sum() > 0
    assert "tensor(1" in capsys.readouterr().out


def test_every_training_option_of_the_readme_is_a_field():
    from rlcm_fast.config import build_parser

    known = {option for action in build_parser()._actions for option in action.option_strings}
    commands = re.findall(r"rlcm_fast/train\.py((?:[^\n\\#`]|\\\n)*)", README)
    used = {option for command in commands for option in re.findall(r"--[\w.]+", command)}
    assert used
    assert used <= known


def test_every_config_of_the_readme_is_there():
    for name in re.findall(r"configs/\w+/\w+\.yaml", README):
        assert (ROOT / name).is_file(), name


def test_every_link_and_picture_of_the_documents_is_there():
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_key_that_the_trainer_logs_is_in_the_table():
    files = ("trainer.py", "stages/update.py", "stages/rollout.py", "tasks.py", "algorithms/advantages.py")
    source = "".join((ROOT / "rlcm_fast" / name).read_text() for name in files)
    keys = re.findall(r'"((?:advantage|ratio|seconds|pretraining)/\w+)"', source)
    assert len(keys) >= 10
    keys += ["iteration", "queries", "lr", "clip_fraction", "approx_kl", "loss", "kl_to_start", "grad_norm"]
    keys += ["skipped_transitions", "advantage/zero_variance_groups", "gradient/<task>/norm"]
    keys += ["reward/<name>/mean", "reward/<task>/<name>/mean", "gradient/<task>/<other>/cosine"]
    keys += ["eval/<reward>/mean", "eval/<reward>/std", "eval/diversity"]
    table = "".join(line for line in README.splitlines() if line.startswith("| `"))
    for key in keys:
        assert f"`{key}`" in table, key
