"""model.vae_dtype=auto keeps float16 if neither pixels nor the run's rewards see it; nothing else of a run changes."""

# B images

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_runs
import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.backbones import pipeline
from rlcm_fast.backbones.image_coder import BothPrecisions
from rlcm_fast.config import ModelConfig, parse_config
from rlcm_fast.rewards import GroupReward, Skipping
from rlcm_fast.rewards.remote import RemoteReward
from rlcm_fast.stages import vae_trial
from rlcm_fast.stages.vae_trial import NUM_TRIED, RewardJudge, TriedTask, relative_change, restore_decoder
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")
PROMPTS = [Prompt(f"prompt {number}") for number in range(NUM_TRIED)]


class Noted:
    """A reward by a formula, which notes how many images it is asked for."""

    scope = "image"

    def __init__(self, formula: Any) -> None:
        self.formula, self.num_images = formula, 0

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        self.num_images += len(images)
        assert [prompt.text for prompt in prompts] != [], "each image has its prompt"
        return self.formula(images).float()


class Spread:
    """A set reward: how far the brightness of a group's images lies apart."""

    scope = "set"

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        return images.mean(dim=(1, 2, 3))[:, None]

    def value(self, described: Tensor) -> Tensor:
        assert described.shape[1] == 2
        return described[:, :, 0].std(dim=1)


def brightness(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def last_digits(images: Tensor) -> Tensor:
    """A reward that sees what nobody sees."""
    return (1e4 * images.mean(dim=(1, 2, 3))) % 1


def broken(images: Tensor) -> Tensor:
    raise RuntimeError("no such model")


def images_in_both(change: float = 1e-4) -> BothPrecisions:
    """NUM_TRIED images of different brightness; float16 adds noise of a size that rounding has."""
    generator = torch.Generator().manual_seed(0)
    noise = change * torch.randn(NUM_TRIED, 3, 8, 8, generator=generator)
    single = torch.rand(NUM_TRIED, 1, 1, 1, generator=generator).expand(-1, 3, 8, 8) * 0.9 + 0.05
    return BothPrecisions(single, single + noise, noise.abs().mean().item())


def judge(rewards: dict[str, Any], left_out: Sequence[str] = (), may_fail: Sequence[str] = ()) -> RewardJudge:
    return RewardJudge([TriedTask(PROMPTS, rewards, frozenset(may_fail))], left_out, timeout=0, micro_batch_size=5)


def test_float16_is_kept_if_no_reward_sees_it_and_the_line_names_the_largest_change():
    rewards = {"bright": Noted(brightness), "spread": GroupReward("spread", Spread(), group_size=2)}
    verdict = judge(rewards)(images_in_both())
    assert verdict.keeps_half
    assert verdict.reason.startswith("which changes pixels by 8.0e-05 and rewards at most by 0.0")
    assert verdict.reason.endswith(" % of its spread (spread)")  # half of a group's noise, on less spread
    assert rewards["bright"].num_images == 2 * NUM_TRIED


def test_a_reward_that_sees_what_pixels_do_not_show_keeps_float32():
    verdict = judge({"bright": Noted(brightness), "digits": Noted(last_digits)}, ["human"])(images_in_both(1e-3))
    assert not verdict.keeps_half
    assert verdict.reason.startswith("because float16 would change digits by ")
    assert verdict.reason.endswith(" % of its spread, over 5 %; without human")


@pytest.mark.parametrize("change", [0.1, math.nan])
def test_rewards_are_not_asked_about_images_that_look_wrong(change: float):
    reward = Noted(brightness)
    verdict = judge({"bright": reward})(images_in_both(change))
    assert not verdict.keeps_half and reward.num_images == 0
    assert verdict.reason.startswith("because float16 would change pixels by ")


def test_a_reward_that_fails_is_left_out_and_said_and_one_that_may_skip_images_is_compared_on_the_others():
    def skips_bright_ones(images: Tensor) -> Tensor:
        if (brightness(images) > 0.8).any():
            raise RuntimeError("too bright")
        return brightness(images)

    verdict = judge({"broken": Noted(broken), "skips": Noted(skips_bright_ones)}, (), ["skips"])(images_in_both())
    assert verdict.keeps_half
    assert verdict.reason.endswith(" % of its spread (skips); without broken")
    alone = judge({"broken": Noted(broken)})(images_in_both())
    assert alone.keeps_half and alone.reason == "which changes pixels by 8.0e-05; without broken"


def test_the_change_is_in_units_of_the_spread():
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    shifted = scores + torch.tensor([0.1, -0.1, 0.1, -0.1])
    assert relative_change(scores, shifted) == pytest.approx(0.1 / scores.std().item())
    assert relative_change(scores, torch.tensor([1.0, 2.0, math.nan, 4.4])) == pytest.approx(0.4 / 3 / 1.5275, rel=1e-3)
    assert relative_change(scores, torch.tensor([1.0, math.nan, math.nan, math.nan])) is None


def test_equal_scores_say_nothing_unless_float16_changes_them():
    equal = torch.zeros(4)
    assert relative_change(equal, equal) == 0
    assert relative_change(equal, torch.tensor([0.0, 0.0, 1e-6, 0.0])) == math.inf


@pytest.mark.parametrize("of_other", ["pixels", "reward", "failed"])
def test_the_process_that_float16_suits_least_decides_for_all(of_other: str, monkeypatch: pytest.MonkeyPatch):
    def gathered(values: list[Any]) -> list[Any]:
        (mine,) = values
        if isinstance(mine, dict):
            others = {"reward": 0.3, "failed": None}
            return [mine, {name: others.get(of_other, change) for name, change in mine.items()}]
        return [mine, 0.02 if of_other == "pixels" else mine]

    monkeypatch.setattr(parallel, "all_gather_list", gathered)
    monkeypatch.setattr(parallel, "any_rank", lambda flag: flag or of_other == "pixels")
    verdict = judge({"bright": Noted(brightness)})(images_in_both())
    assert verdict.keeps_half == (of_other == "failed")
    said = {
        "pixels": "because float16 would change pixels by 2.0e-02",
        "reward": "because float16 would change bright by 30 % of its spread, over 5 %",
        "failed": "which changes pixels by 8.0e-05; without bright",
    }
    assert verdict.reason == said[of_other]


class AskingPeople(Noted):
    asks_people = True


def test_who_may_charge_is_not_asked_and_groups_are_of_two(monkeypatch: pytest.MonkeyPatch):
    remote = object.__new__(RemoteReward)  # without a server
    mine = {"here": (Noted(brightness), 1.0), "people": (AskingPeople(brightness), 1.0), "served": (remote, 1.0)}
    grouped = {"spread": (GroupReward("spread", Spread(), group_size=8), 1.0)}
    tasks: Any = SimpleNamespace(
        known=lambda most: {"a": PROMPTS[:3], "b": []},
        trained={"a": {**mine, **grouped}, "b": mine},
        are_several=True,
        skipping={"a": Skipping(frozenset({"here"})), "b": Skipping()},
    )
    (first, second), left_out = vae_trial._tried(tasks, PROMPTS[3:4])
    assert list(first.rewards) == ["a/here", "a/spread"] and first.may_fail == {"a/here"}
    assert first.rewards["a/spread"].group_size == 2  # type: ignore[attr-defined]
    assert first.prompts == [PROMPTS[index % 3] for index in range(NUM_TRIED)]
    assert second.rewards == {} and second.prompts == PROMPTS[3:4] * NUM_TRIED
    assert left_out == ["a/people", "a/served", "b/here", "b/people", "b/served"]


def made(model: str, run_dir: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Trainer:
    """A trainer whose device could use float16."""
    monkeypatch.setattr(pipeline, "_vae_dtype", lambda model, *_: model.vae_dtype)
    return Trainer(parse_config(tiny_runs.arguments(model, run_dir, settings)))


SENSITIVE = {"rewards": [{"name": "plugin_rewards:LastDigits"}]}


@pytest.mark.parametrize(("settings", "precision"), [({}, "float16"), (SENSITIVE, "float32")])
def test_a_run_chooses_before_it_decodes_and_changes_nothing_else(
    settings: dict[str, Any],
    precision: str,
    tiny_lcm_folder: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    trainer = made(tiny_lcm_folder, tmp_path / "run", monkeypatch, **settings)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "model.vae_dtype=auto" in line]
    assert f"the VAE decodes in {precision}, " in line and "of its spread" in line
    backbone, parts = trainer.images.backbone, trainer.parts
    assert backbone.decoder_precision == precision and not backbone.decoder_is_open
    assert parts.state_dict()["decoder"] == precision

    # Once more: it moves no random numbers, no prompts and no count, and it chooses the same.
    before, random = trainer.state_dict(), torch.get_rng_state()
    backbone._coder.is_open = True
    vae_trial.choose_decoder(trainer.images, trainer.tasks, parts.evaluation.grid.prompts, parts.config)
    assert trainer.state_dict() == before and torch.equal(torch.get_rng_state(), random)
    assert f"the VAE decodes in {precision}, " in capsys.readouterr().err
    trainer.parts.close()


def test_a_resumed_run_decodes_as_its_checkpoint_did(
    tiny_lcm_folder: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    calls = list[bool]()
    backbone: Any = SimpleNamespace(
        decoder_precision="float16", device=torch.device("cuda"), set_decoder=lambda in_half: calls.append(in_half)
    )
    auto = ModelConfig(tiny_lcm_folder)
    for kept, model in ((None, auto), ("float16", auto), ("float32", replace(auto, vae_dtype="fp16"))):
        restore_decoder(kept, model, backbone)
    assert calls == [] and "vae_dtype" not in capsys.readouterr().err
    restore_decoder("float32", auto, backbone)
    assert calls == [False]
    assert "in float32, as until the checkpoint; the trial chose float16" in capsys.readouterr().err
    backbone.device, backbone.decoder_precision = torch.device("cpu"), "float32"
    restore_decoder("float16", auto, backbone)
    assert calls == [False]
    assert "in float32 on a CPU; until the checkpoint it was float16" in capsys.readouterr().err
