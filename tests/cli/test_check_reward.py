"""rlcm-fast check-reward: each check passes for a reward that keeps its promise, and fails for one that does not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from rlcm_fast.cli.main import main
from rlcm_fast.cli.reward_checks import Pictures, Subject, Verdict
from rlcm_fast.trajectory import Prompt

BRIGHTNESS = "plugin_rewards:Brightness"


def report(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    assert main(["check-reward", *arguments, "--size", "16", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_good_reward_passes(capsys: pytest.CaptureFixture[str]):
    checks = report(capsys, BRIGHTNESS)["checks"]
    assert {check["verdict"] for check in checks.values()} == {"ok"}
    assert checks["finite scores"]["scores"] == pytest.approx({"black": 0, "white": 10, "noise": 5}, abs=0.2)
    assert checks["two calls at once"]["difference"] == 0
    assert checks["time"]["seconds_per_picture"] > 0
    assert checks["gradient"]["gradient"] == pytest.approx(10 / (3 * 16 * 16) * (3 * 3 * 16 * 16) ** 0.5)


def test_a_reward_without_a_gradient_passes_too(capsys: pytest.CaptureFixture[str]):
    assert report(capsys, "jpeg_compressibility")["checks"]["gradient"] == {
        "verdict": "ok",
        "words": "none, and none is needed",
        "gradient": None,
    }


def test_a_set_reward_is_valued_as_one_group_and_alone(capsys: pytest.CaptureFixture[str]):
    found = report(capsys, "diversity")["checks"]["finite values"]
    assert found["value"] > 0
    assert found["values_alone"] == [0, 0, 0]


def test_a_person_is_not_asked_but_told_where(capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("uvicorn")
    checks = report(capsys, "human", "--arguments", "{port: 0}")["checks"]
    assert list(checks) == ["builds", "asks a person"]
    assert checks["asks a person"]["words"] == "asks a person on http://127.0.0.1, any free port; nobody was asked"


def test_arguments_and_pictures_are_those_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    Image.new("RGB", (8, 8), (51, 51, 51)).save(tmp_path / "dark.png")
    given = ["--image", str(tmp_path / "dark.png"), "--prompt", '{"text": "dark", "objects": ["a lamp"]}']
    found = report(capsys, "plugin_rewards:Slow", "--arguments", "{seconds: 0.001}", *given)
    assert found["arguments"] == {"seconds": 0.001}
    assert found["checks"]["finite scores"]["scores"][str(tmp_path / "dark.png")] == pytest.approx(2.0)


def test_the_table_ends_with_a_verdict(capsys: pytest.CaptureFixture[str]):
    assert main(["check-reward", BRIGHTNESS, "--size", "16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok     builds")
    assert lines[-1] == f"{BRIGHTNESS}: it can be trained on"


@pytest.mark.parametrize("fault", ["nan", "inf", "shape", "exception"])
def test_a_reward_that_fails_is_reported_with_exit_code_1(fault: str, capsys: pytest.CaptureFixture[str]):
    arguments = f"{{fault: {fault}, good_calls: 0}}"
    assert main(["check-reward", "plugin_rewards:Faulty", "--arguments", arguments, "--size", "16"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("FAILED finite scores")
    assert lines[-1] == "plugin_rewards:Faulty: failed: finite scores"


class Counting:
    """Adds the number of its calls to the score."""

    scope = "image"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.calls += 1
        return images.flatten(1).mean(dim=1) + self.calls


class Relative:
    """Scores images against the mean of their batch."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        brightness = images.flatten(1).mean(dim=1)
        return brightness - brightness.mean()


class Unlocked:
    """Keeps the images of a call where the next call finds its own."""

    scope = "image"

    def __init__(self) -> None:
        self.at_once = threading.Barrier(2)
        self.images: Tensor | None = None

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.images = images
        try:
            self.at_once.wait(timeout=0.2)  # until the other call has kept its images, too
        except threading.BrokenBarrierError:
            self.at_once.reset()
        time.sleep(0.01)
        return self.images.flatten(1).mean(dim=1)


class Inverting:
    """Changes the images."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.neg_().flatten(1).mean(dim=1)


def subject(reward) -> Subject:
    images = (
        torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(4)[:, None, None, None] / 4
    )
    prompts = [Prompt("x")] * 4
    return Subject("it", reward, Pictures(images, prompts, list("abcd")), reward(images.clone(), prompts))


def test_a_reward_that_remembers_its_calls_is_not_repeatable():
    found = subject(Counting()).repeatable()
    assert found.verdict is Verdict.FAILED
    assert "scores must depend on the arguments alone" in found.words


def test_a_reward_that_looks_at_the_batch_gets_a_note():
    found = subject(Relative()).one_by_one()
    assert found.verdict is Verdict.NOTE
    assert "a score depends on its neighbours" in found.words


def test_a_reward_with_shared_state_fails_with_two_calls_at_once():
    found = subject(Unlocked()).two_at_once()
    assert found.verdict is Verdict.FAILED
    assert "it needs a lock, or rollout.reward_workers: 1" in found.words


def test_a_reward_that_changes_the_images_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    import plugin_rewards

    monkeypatch.setattr(plugin_rewards, "Inverting", Inverting, raising=False)
    assert main(["check-reward", "plugin_rewards:Inverting", "--size", "8"]) == 1
    assert "FAILED unchanged images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jpeg"], "name=jpeg is not known; "),
        (["diversity", "--arguments", "thumbnails"], "arguments=thumbnails is no mapping; write '{key: value}'"),
        (
            ["diversity", "--arguments", "{wrong: 1}"],
            "got an unexpected keyword argument 'wrong'; it accepts embedding",
        ),
        (["{name: diversity}", "--arguments", "{}"], "beside the mapping {name: diversity}; write them into it"),
        (["diversity", "--image", "no.png"], "image=no.png cannot be read as a picture ("),
        (["diversity", "--prompt", "a", "b"], "prompt has 2 entries for 0 images; give one"),
        (["diversity", "--prompt", '{"text": ""}'], 'prompt is {"text": ""}, where a value is no text or empty; write'),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["check-reward", *arguments]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_pictures_of_two_sizes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    names = [str(tmp_path / name) for name in ("a.png", "b.png")]
    for name, side in zip(names, (8, 9), strict=True):
        Image.new("RGB", (side, 8)).save(name)
    assert main(["check-reward", "diversity", "--image", *names]) == 2
    assert f"image={names[1]} has 9 x 8 pixels, and the first has 8 x 8; give one size" in capsys.readouterr().err
