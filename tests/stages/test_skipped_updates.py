"""Updates whose gradient is not finite: what a run says, counts and records, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, engine_of, policy_of, trajectory_of
from torch import Tensor

from rlcm_fast.algorithms import PPO
from rlcm_fast.config import UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.faults import Diverged
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update import Updater
from rlcm_fast.stages.update_metrics import UpdateMetrics

pytestmark = pytest.mark.usefixtures("one_process")
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 0.1, -0.4])
NAN = ADVANTAGES.clone().index_fill(0, torch.tensor([2]), math.nan)  # one sample of eight


class RealImages:
    """A loss whose value is NaN and whose gradient is zero."""

    num_micro_batches = 1
    num_skipped = 0

    def __init__(self, network: TinyNetwork) -> None:
        self.network = network

    def read(self) -> None:
        pass

    def losses(self) -> Iterator[Tensor]:
        bias = self.network.of_state.bias
        assert bias is not None
        yield bias.sum() * 0.0 + torch.tensor(math.nan)


class Setting:
    """An updater of two updates per rollout; `lines` is what it said."""

    def __init__(self, most: int = 3, engine: Engine | None = None, num_updates: int = 2, **parts: Any) -> None:
        self.lines: list[str] = []
        self.network = TinyNetwork()
        self.engine = engine or engine_of(self.network, 2)
        self.policy = policy_of(self.engine)
        config = UpdateConfig(
            num_updates=num_updates, micro_batch_size=16 // num_updates // 2, max_skipped_updates=most, kl_weight=0.1
        )
        self.updater = Updater(self.policy, PPO(), self.engine, config, say=self.lines.append, **parts)

    def update(self, iteration: int, advantages: Tensor = ADVANTAGES) -> UpdateMetrics:
        return self.updater.update(trajectory_of(self.policy, 8), advantages, Turn(iteration, seed=4))


def test_a_skipped_update_is_said_counted_and_kept_out_of_the_norm():
    setting = Setting()
    before = setting.engine.full_weights()
    metrics = setting.update(5, NAN).metrics(ADVANTAGES)
    # Both actions of the sample may lie in one update, or one in each.
    assert metrics["skipped_updates"] == len(setting.lines) in (1, 2)
    assert math.isnan(metrics["loss"])
    assert math.isfinite(metrics["grad_norm"]) == (metrics["skipped_updates"] == 1)
    line = setting.lines[0]
    assert line.startswith("warning: iteration 5, update ") and "the gradient is not finite (loss); it moved" in line
    after = setting.engine.full_weights()
    assert any(not torch.equal(after[name], before[name]) for name in before) == (metrics["skipped_updates"] == 1)
    assert setting.update(6).metrics(ADVANTAGES)["skipped_updates"] == 0
    assert setting.updater.skipped.in_a_row == 0


def test_a_run_stops_after_so_many_skipped_updates_in_a_row_over_iterations():
    setting = Setting(most=3)
    everything = torch.full_like(ADVANTAGES, math.nan)
    metrics = setting.update(0, everything).metrics(ADVANTAGES)
    assert metrics["skipped_updates"] == 2 and math.isnan(metrics["grad_norm"])
    assert [line.rpartition(". ")[2] for line in setting.lines] == [
        f"{number} in a row, the run stops at 3" for number in (1, 2)
    ]
    message = (
        r"^iteration 1, update 1: the gradient is not finite \(loss\), for 3 updates in a row "
        r"\(update.max_skipped_updates=3\): lower optimizer.lr"
    )
    with pytest.raises(Diverged, match=message):
        setting.update(1, everything)


def test_an_update_that_moves_weights_breaks_the_row():
    setting = Setting(most=2, num_updates=1)
    for iteration in range(3):
        setting.update(2 * iteration, NAN)
        setting.update(2 * iteration + 1)
    assert len(setting.lines) == 3


def test_with_the_optimizer_in_the_backward_pass_the_first_one_stops_the_run():
    engine = engine_of(TinyNetwork(), 1, in_backward=True, name="adamw_8bit")
    setting = Setting(engine=engine, num_updates=1)
    setting.updater.config = UpdateConfig(micro_batch_size=16)
    setting.update(0)
    with pytest.raises(Diverged, match="^iteration 1, update 1: .* has moved other weights by then: go on from"):
        setting.update(1, NAN)


@pytest.mark.parametrize("part", ["kl_to_start", "pretraining/loss"])
def test_a_kl_term_or_a_loss_on_real_images_that_is_not_finite_is_named(part: str):
    setting = Setting(num_updates=1, engine=engine_of(TinyNetwork(), 3 if part == "pretraining/loss" else 2))
    if part == "pretraining/loss":
        setting.updater.real_images = RealImages(setting.engine._engine.module)  # type: ignore[attr-defined]
    else:
        start = TinyNetwork()
        torch.nn.init.constant_(start.of_state.bias, math.nan)
        setting.updater.start_model = StartModel(policy_of(start))  # its outputs are NaN
    before = setting.engine.full_weights()
    metrics = setting.update(0).metrics(ADVANTAGES)
    assert f"({part})" in setting.lines[0]
    assert metrics["skipped_updates"] == 1 and math.isnan(metrics[part]) and math.isfinite(metrics["loss"])
    assert all(torch.equal(weight, before[name]) for name, weight in setting.engine.full_weights().items())


def test_a_gradient_alone_is_said_to_be_alone():
    setting = Setting(num_updates=1)
    setting.network.of_text.bias.register_hook(lambda gradient: gradient * math.inf)
    metrics = setting.update(0).metrics(ADVANTAGES)
    assert metrics["skipped_updates"] == 1 and math.isfinite(metrics["loss"])
    assert "(the losses are finite)" in setting.lines[0]
