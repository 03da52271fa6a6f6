"""Runs with a loss on real images beside the rewards, and with the start model parked in the CPU's memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from PIL import Image
from tiny_policies import TinyBackbone, TinyNetwork, encode, engine_of, images_of, policy_of, prompts, trajectory_of
from torch import Tensor

from rlcm_fast.algorithms import PPO
from rlcm_fast.config import Config, PretrainingConfig, UpdateConfig, parse_config
from rlcm_fast.config.checks import validate
from rlcm_fast.pairs import PairsFault
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.real_images import RealImages
from rlcm_fast.stages.update import Updater
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Conditioning, Prompt

pytestmark = pytest.mark.usefixtures("one_process")
PAIRS = {"pretraining.data": "shapes:one", "pretraining.weight": 0.5, "pretraining.batch_size": 4}
PAIRS |= {"pretraining.micro_batch_size": 2}


def make_config(model: str, run_dir: Path, settings: dict[str, Any]) -> Config:
    return parse_config(tiny_runs.arguments(model, run_dir, settings))


def final_weights(config: Config) -> dict[str, Tensor]:
    trainer = Trainer(config)
    trainer.run()
    return trainer.engine.full_weights()


class Pull:
    """Draws the network's outputs to 0, in two micro-batches."""

    num_micro_batches = 2
    num_skipped = 0

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.x_t = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(8))

    def read(self) -> None:
        pass

    def losses(self) -> Iterator[Tensor]:
        conditioning = encode(prompts(4))
        for rows in torch.arange(4).split(2):
            step = torch.zeros(2, dtype=torch.int64)
            m = self.policy.network_output(self.x_t[rows], step, conditioning.take(rows))
            yield m.square().mean() / 2


def test_an_update_adds_the_gradient_of_the_other_loss_to_its_own():
    gradients = []
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 0.1, -0.4])
    for has_rewards, has_other in ((True, True), (True, False), (False, True)):
        network = TinyNetwork()
        engine = engine_of(network, 6, eps=1.0, lr=1.0)
        policy, before = policy_of(engine), engine.full_weights()
        trajectory = trajectory_of(policy_of(TinyNetwork()), 8)
        config = UpdateConfig(micro_batch_size=4)
        extra = Pull(policy) if has_other else None
        weights = advantages * has_rewards
        updater = Updater(policy, PPO(), engine, config, real_images=extra)
        metrics = updater.update(trajectory, weights, Turn(0))
        assert (metrics.real_image_loss is not None) == has_other
        after = engine.full_weights()
        step = torch.cat([(before[name] - after[name]).flatten().double() for name in before])
        gradients.append(step / (1 - step.abs()))  # undoes Adam's first step g / (|g| + 1)
    both, rewards, other = gradients
    assert rewards.norm() > 1e-3 and other.norm() > 1e-3
    assert (both - rewards - other).norm() / both.norm() < 1e-5


def test_pairs_are_trained_on_in_every_update_and_a_resumed_run_goes_on_bitwise(tiny_lcm_folder: str, tmp_path: Path):
    config = make_config(tiny_lcm_folder, tmp_path / "whole", {**PAIRS, "checkpoint.every": 1, "checkpoint.keep": 9})
    whole = final_weights(config)
    lines = tiny_runs.metrics(tmp_path / "whole", with_times=True)
    assert all(line["pretraining/loss"] > 0 for line in lines[:3])
    assert all(0 < line["seconds/pretraining"] < line["seconds/update"] for line in lines[:3])
    checkpoint = tmp_path / "whole" / "checkpoints" / "iteration_000001"
    resumed = final_weights(replace(config, run_dir=str(tmp_path / "resumed"), resume=str(checkpoint)))
    assert all(torch.equal(value, whole[name]) for name, value in resumed.items())
    without = final_weights(make_config(tiny_lcm_folder, tmp_path / "without", {}))
    assert any(not torch.equal(value, whole[name]) for name, value in without.items())


@pytest.mark.parametrize("engine", [{}, {"engine.zero_stage": 1, "engine.dtype": "bf16"}])
def test_a_start_model_that_waits_on_the_cpu_gives_the_run_of_a_copy(
    engine: dict[str, Any], tiny_lcm_folder: str, tmp_path: Path
):
    settings = {"update.kl_weight": 0.1, "update.num_passes": 2, **engine}
    for where in ("copy", "offload"):
        final_weights(make_config(tiny_lcm_folder, tmp_path / where, {**settings, "update.kl_reference": where}))
    copied, parked = (tiny_runs.metrics(tmp_path / where) for where in ("copy", "offload"))
    assert copied == parked
    assert copied[1]["kl_to_start"] > 0


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"update.kl_reference": "offload", "engine.zero_stage": 3}, "swaps whole weights, and engine.zero_stage=3"),
        ({"update.kl_reference": "offload", "lora.rank": 4}, "has no use with lora.rank=4"),
        (
            {**PAIRS, "engine.optimizer_in_backward": True, "optimizer.name": "adamw_8bit"},
            "and pretraining.weight=0.5 adds another",
        ),
    ],
)
def test_what_cannot_go_together_is_one_line(settings: dict[str, Any], problem: str, tiny_lcm_folder, tmp_path: Path):
    with pytest.raises(ValueError, match=problem):
        validate(make_config(tiny_lcm_folder, tmp_path, settings), 1)


class Pictures(TinyBackbone):
    """A latent is the first channel, whatever the caption."""

    image_size = 8

    def encode(self, prompts: Sequence[Prompt], with_negative: bool, remember: bool = True) -> Conditioning:
        return encode([Prompt("a")] * len(prompts))

    def encode_images(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return images[:, :1]


def write_pictures(folder: Path, num_pictures: int, broken: Sequence[int]) -> str:
    """Grey pictures of levels 0, 10, 20, ..., of which some cannot be read."""
    folder.mkdir()
    for i in range(num_pictures):
        Image.new("RGB", (8, 8), (10 * i,) * 3).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("grey")
        if i in broken:
            (folder / f"{i}.png").write_bytes(b"no picture")
    return str(folder)


def real_images_of(data: str, **settings: Any) -> RealImages:
    config = PretrainingConfig(data=data, weight=0.5, caption_dropout=0.0, **settings)
    return RealImages(config, images_of(policy_of(TinyNetwork()), Pictures()), seed=0)


@pytest.mark.parametrize(("broken", "micro_batch_size"), [((), 2), ((1,), 2), ((0, 5), 2), ((1, 2, 3), 1), ((4,), 6)])
def test_the_loss_is_the_mean_over_the_pairs_that_can_be_read(
    broken: tuple[int, ...], micro_batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rlcm_fast.stages.real_images.real_image_loss", lambda policy, x_0, *_: x_0.mean(dim=(1, 2, 3)))
    data = write_pictures(tmp_path / "data", 6, broken)
    real_images = real_images_of(data, batch_size=6, micro_batch_size=micro_batch_size)
    real_images.read()
    losses = list(real_images.losses())
    assert len(losses) == real_images.num_micro_batches
    assert real_images.num_skipped == len(broken)
    levels = [10 * i / 255 for i in range(6) if i not in broken]
    assert torch.stack(losses).sum().item() == pytest.approx(0.5 * sum(levels) / len(levels))


def test_too_many_unreadable_pairs_stop_the_run_and_name_the_last(tmp_path: Path):
    data = write_pictures(tmp_path / "data", 8, [3])
    message = (
        r"3.png cannot be read .*; 11 of 88 pairs could not be read, more than pretraining.max_unreadable=0.01 all"
    )
    tolerant, strict = (
        real_images_of(data, batch_size=8, micro_batch_size=8, **more) for more in ({}, {"max_unreadable": 0.0})
    )
    for _ in range(10):  # 10 are 1 % of 1,000
        tolerant.read()
    with pytest.raises(PairsFault, match=message) as raised:
        tolerant.read()
    assert raised.value.is_on_all_processes
    with pytest.raises(PairsFault, match="1 of 8 pairs could not be read"):
        strict.read()


def test_data_that_fail_end_the_run_before_weights_move(tiny_lcm_folder: str, tmp_path: Path):
    data = write_pictures(tmp_path / "data", 4, [0, 1, 2, 3])
    trainer = Trainer(make_config(tiny_lcm_folder, tmp_path / "run", {**PAIRS, "pretraining.data": data}))
    before = trainer.engine.full_weights()
    with pytest.raises(PairsFault):
        trainer.run()
    assert all(torch.equal(value, before[name]) for name, value in trainer.engine.full_weights().items())


def test_a_run_counts_what_it_skips(tiny_lcm_folder: str, tmp_path: Path):
    data = write_pictures(tmp_path / "data", 4, [2])
    settings = {**PAIRS, "pretraining.data": data, "num_iterations": 1}
    final_weights(make_config(tiny_lcm_folder, tmp_path / "run", settings))
    (line, *_) = tiny_runs.metrics(tmp_path / "run")
    assert line["pretraining/skipped"] == 2  # once in each of two updates
    assert math.isfinite(line["pretraining/loss"])
