"""A run calls its rewards on two random images before the model loads; a wrong one costs nothing but one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.rewards import GroupReward, Trial
from rlcm_fast.train import main
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")

SEEN: list[tuple[tuple[int, ...], list[Prompt]]] = []


class Notes:
    """Notes what it is called with."""

    scope = "image"

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        SEEN.append((tuple(images.shape), list(prompts)))
        return images.mean(dim=(1, 2, 3))


class AsksAHuman(Notes):
    asks_people = True


class LacksPrompts:
    scope = "image"

    def __call__(self, images: Tensor) -> Tensor:
        return images.mean(dim=(1, 2, 3))


class SetLacksValue:
    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(2, 3))

    def value(self) -> Tensor:
        return torch.zeros(1)


class Spread:
    scope = "set"

    def __init__(self, fault: str = "") -> None:
        self._fault = fault

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        described = images.mean(dim=(2, 3))
        return described[:, 0] if self._fault == "describe" else described

    def value(self, described: Tensor) -> Tensor:
        return described if self._fault == "value" else described.std(dim=1).sum(dim=1)


class Wrong(Notes):
    def __init__(self, fault: str) -> None:
        self._fault = fault

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        scores = super().__call__(images, prompts)
        if self._fault == "KeyError":
            return {}["x"]
        return {
            "None": None,
            "list": scores.tolist(),
            "shape": scores[:1],
            "half": scores.half(),
            "nan": scores * torch.nan,
        }[self._fault]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models whose weights were loaded."""
    found: list[str] = []
    load = Backbone.load

    def noted(model: Any, *arguments: Any, **keywords: Any) -> Backbone:
        found.append(model.path)
        return load(model, *arguments, **keywords)

    monkeypatch.setattr(Backbone, "load", noted)
    SEEN.clear()
    return found


def named(kind: str, arguments: str = "{}", more: str = "") -> str:
    return f"[{{name: '{__name__}:{kind}', arguments: {arguments}{more}}}]"


CASES = {
    named("LacksPrompts"): "__call__: too many positional arguments as it is called with (self, images, prompts)",
    named("SetLacksValue"): "value: too many positional arguments as it is called with (self, described)",
    named("Notes", "{fault: 1}"): "arguments={'fault': 1}: got an unexpected keyword argument 'fault'",
    named("Wrong"): "missing a required argument: 'fault'",
    named("Wrong", "{fault: KeyError}"): "tried on two random images: it raised KeyError: 'x'; repair",
    named("Wrong", "{fault: 'None'}"): "tried on two random images: it returned NoneType; return a float32 tensor",
    named("Wrong", "{fault: list}"): "it returned list; return a float32 tensor of shape (2,)",
    named("Wrong", "{fault: shape}"): "it returned torch.float32 of shape (1,); return torch.float32 of shape (2,)",
    named("Wrong", "{fault: half}"): "it returned torch.float16 of shape (2,); return torch.float32",
    named("Wrong", "{fault: nan}"): "it returned nan for image 0",
    named("Wrong", "{fault: list}", ", on_failure: skip"): "it returned list; return a float32 tensor",
    named("Spread", "{fault: describe}"): "it describe() returned torch.float32 of shape (2,)",
    named("Spread", "{fault: value}"): "it value() returned torch.float32 of shape (1, 2, 3)",
}


@pytest.mark.parametrize("rewards", CASES)
def test_a_wrong_reward_is_one_line_before_weights_load(
    rewards: str, loads: list[str], tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    assert main([*tiny_runs.arguments(tiny_lcm_folder, run_dir), f"--rewards={rewards}"]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("rewards built")]
    assert len(error) == 1
    assert error[0].startswith(f"error: rewards[0].name={__name__}:") and CASES[rewards] in error[0]
    assert (loads, run_dir.exists()) == ([], False)


def test_after_a_wrong_reward_the_corrected_command_runs(
    loads: list[str], tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    arguments = tiny_runs.arguments(tiny_lcm_folder, run_dir, {"num_iterations": 1})
    run_dir.mkdir()  # with what a start of an earlier version, or one that was killed, has left
    (run_dir / "metrics.jsonl").touch()
    (run_dir / "lock").write_text("{}")
    (run_dir / "lock").touch()
    os.utime(run_dir / "lock", (0, 0))
    assert main([*arguments, f"--rewards={named('Wrong', '{fault: list}')}"]) == 2
    assert main([*arguments, f"--rewards={named('Notes')}"]) == 0
    capsys.readouterr()
    assert len(loads) == 1
    assert len(tiny_runs.metrics(run_dir)) == 1
    # The first call was the trial: two images of the run's size with the first prompts.
    shape, prompts = SEEN[1]
    assert shape[0] == 2 and shape == SEEN[2][0]
    assert [prompt.text for prompt in prompts] == list(tiny_runs.PROMPTS[:2])


def test_a_dry_run_calls_no_reward(loads: list[str], tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]):
    arguments = ["--model.path", tiny_lcm_folder, "--dry_run", f"--rewards={named('Wrong', '{fault: list}')}"]
    assert main(arguments) == 0
    assert (SEEN, loads) == ([], [])


def trial(kind: Any, *prompts: Prompt, may_fail: bool = False) -> None:
    reward = GroupReward("r", kind) if kind.scope == "set" else kind
    Trial("rewards[0].name", "r", reward, prompts, may_fail).run((8, 16), "cpu", 5.0)


def test_what_is_not_tried():
    SEEN.clear()
    trial(AsksAHuman(), Prompt("a cat"))
    trial(Notes())  # no prompt is at hand
    assert SEEN == []


def test_a_trial_has_the_metadata_of_the_first_prompts_and_any_group_size():
    SEEN.clear()
    prompt = Prompt("a cat", metadata='{"objects": ["cat"]}')
    trial(Notes(), prompt)
    assert [((2, 3, 8, 16), [prompt, prompt])] == SEEN
    trial(Spread(), prompt)


def test_a_reward_that_may_fail_for_single_images_may_fail_here():
    trial(Wrong("KeyError"), Prompt("a cat"), may_fail=True)
    with pytest.raises(ValueError, match="it returned list"):
        trial(Wrong("list"), Prompt("a cat"), may_fail=True)
