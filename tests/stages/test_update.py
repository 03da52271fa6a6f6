"""The optimizer steps on a rollout, on a network of 300 weights under the real engine."""

# B samples, K actions: 8 x 2 transitions

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, engine_of, policy_of, trajectory_of
from torch import Tensor

from rlcm_fast.algorithms import PPO, Algorithm
from rlcm_fast.algorithms.losses import Rebel
from rlcm_fast.config import UpdateConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.policies import GaussianPolicy
from rlcm_fast.run_folder.interruption import Interrupted
from rlcm_fast.stages.rollout_updates import RolloutUpdates
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update import Updater
from rlcm_fast.stages.update_metrics import UpdateMetrics
from rlcm_fast.trajectory import Trajectory

pytestmark = pytest.mark.usefixtures("one_process")
NUM_SAMPLES, NUM_TRANSITIONS = 8, 16
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 0.1, -0.4])


class Setting:
    """A network under an engine, its policy, and a trajectory that the policy drew."""

    def __init__(self, micro_batch_size: int = 4, num_updates: int = 1, num_passes: int = 1, **engine: Any) -> None:
        in_update = NUM_TRANSITIONS // num_updates
        self.network = TinyNetwork()
        self.start_model = StartModel(policy_of(copy.deepcopy(self.network)))
        self.engine = engine_of(self.network, in_update // micro_batch_size, **engine)
        self.policy: GaussianPolicy = policy_of(self.engine)
        self.trajectory: Trajectory = trajectory_of(self.policy, NUM_SAMPLES)
        self.config = UpdateConfig(
            clip_range=1e-2, num_updates=num_updates, num_passes=num_passes, micro_batch_size=micro_batch_size
        )

    def update(self, advantages: Tensor = ADVANTAGES, **changes: Any) -> UpdateMetrics:
        """changes: of `updater`, and may_stop."""
        may_stop = changes.pop("may_stop", lambda: None)
        return self.updater(**changes).update(self.trajectory, advantages, Turn(0, seed=4), may_stop)

    def updater(self, kl_weight: float = 0.0, algorithm: Algorithm | None = None) -> Updater:
        config = replace(self.config, kl_weight=kl_weight)
        algorithm = algorithm or PPO(clip_range=config.clip_range, advantage_clip=config.advantage_clip)
        start_model = self.start_model if kl_weight else None
        return Updater(self.policy, algorithm, self.engine, config, start_model)

    def ratio_noise(self) -> float:
        return self.updater().ratio_noise(self.trajectory, torch.Generator().manual_seed(0))

    @torch.no_grad()
    def log_probs(self) -> Tensor:
        """(B, K) under the present weights."""
        every = self.trajectory.transitions(torch.arange(NUM_TRANSITIONS))
        return self.policy.log_prob(every).reshape(NUM_SAMPLES, -1)


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> Tensor:
    return torch.cat([(first[name] - second[name]).flatten() for name in first])


def test_micro_batches_add_up_to_one_batch():
    # With eps = 1 Adam's first step is about lr * gradient, so weights compare as gradients do. Micro-batches of one
    # transition are left out: a convolution of a single image rounds differently (2e-6).
    changes, norms = [], []
    for micro_batch_size in (16, 8, 4, 2):
        setting = Setting(micro_batch_size, eps=1.0, lr=1.0)
        before = setting.engine.full_weights()
        norms.append(setting.update().grad_norm)
        changes.append(difference(setting.engine.full_weights(), before).double())
    assert changes[0].norm() > 1e-3
    for change, norm in zip(changes[1:], norms[1:], strict=True):
        assert (change - changes[0]).norm() / changes[0].norm() < 1e-6
        assert norm == pytest.approx(norms[0], rel=1e-6)


def test_an_update_makes_good_actions_likelier_and_bad_ones_less_likely():
    setting = Setting(lr=1e-4)
    before = setting.log_probs()
    setting.update()
    change = (setting.log_probs() - before).mean(dim=1)
    assert torch.dot(change, ADVANTAGES) > 0


def test_with_one_update_a_rollout_the_ratio_is_exactly_one():
    metrics = Setting().update()
    assert (metrics.ratio_mean, metrics.ratio_max_deviation, metrics.clip_fraction, metrics.approx_kl) == (1, 0, 0, 0)
    assert metrics.grad_norm > 0


@pytest.mark.parametrize("num_updates, num_passes", [(2, 1), (1, 2)])
def test_from_the_second_update_on_the_ratio_moves_and_is_clipped(num_updates: int, num_passes: int):
    metrics = Setting(num_updates=num_updates, num_passes=num_passes, lr=0.1).update()
    assert metrics.ratio_max_deviation > 1e-2
    assert 0 < metrics.clip_fraction <= 0.5  # the first update of two is on-policy
    assert metrics.approx_kl > 0


def test_every_transition_is_trained_on_once_a_pass_and_steps_are_mixed():
    setting = Setting(num_passes=2, num_updates=2)
    seen: list[tuple[int, int]] = []
    steps: list[set[int]] = []
    transitions = setting.trajectory.transitions

    class Watched(Trajectory):
        def transitions(self, rows: Tensor) -> Any:
            taken = transitions(rows)
            seen.extend(zip(taken.sample.tolist(), taken.step.tolist(), strict=True))
            steps.append(set(taken.step.tolist()))
            return taken

    setting.trajectory = Watched(**vars(setting.trajectory))
    setting.update()
    every = [(sample, step) for sample in range(NUM_SAMPLES) for step in range(2)]
    assert sorted(seen[:NUM_TRANSITIONS]) == every and sorted(seen[NUM_TRANSITIONS:]) == every
    assert seen[:NUM_TRANSITIONS] != seen[NUM_TRANSITIONS:] != every
    assert {0, 1} in steps


def test_the_kl_to_the_start_is_zero_at_first_and_then_its_closed_form():
    setting = Setting(lr=1e-3)
    at_first = setting.update(kl_weight=0.1).kl_to_start
    every = setting.trajectory.transitions(torch.arange(NUM_TRANSITIONS))
    with torch.no_grad():
        inputs = (every.x_t, every.step, every.conditioning)
        shift = setting.policy.network_output(*inputs) - setting.start_model.policy.network_output(*inputs)
    _, b, sigma = setting.policy.coefficients(every.step).T
    closed_form = ((b / sigma) ** 2 * shift.square().flatten(1).mean(dim=1) / 2).mean()
    # a row's output may differ by its place in a batch: 0 on a Xeon, 2e-14 of 3e-3 on an EPYC with AVX512-BF16
    assert 0 <= at_first < 1e-9 * closed_form
    torch.testing.assert_close(setting.update(kl_weight=0.1).kl_to_start, closed_form, rtol=1e-5, atol=0)


def test_the_kl_term_alone_pulls_back_to_the_start():
    setting = Setting(lr=1e-3)
    setting.update()
    nothing = torch.zeros(NUM_SAMPLES)
    kls = [setting.update(nothing, kl_weight=1.0).kl_to_start.item() for _ in range(15)]
    assert kls[-1] < 0.5 * max(kls)


def test_stopping_is_offered_before_each_micro_batch_of_the_first_update_only():
    setting = Setting(num_updates=2)
    calls: list[int] = []
    setting.update(may_stop=lambda: calls.append(1))
    assert len(calls) == 2  # 8 transitions of an update in micro-batches of 4


def test_stopping_there_leaves_the_weights_alone():
    setting = Setting()
    before = setting.engine.full_weights()
    with pytest.raises(Interrupted):
        setting.update(may_stop=_stop_at(3))
    assert not difference(setting.engine.full_weights(), before).any()


def _stop_at(number: int) -> Callable[[], None]:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == number:
            raise Interrupted

    return stop


def test_ratio_noise_is_rounding_under_unchanged_weights_and_sees_changed_ones():
    setting = Setting(lr=1e-2)
    assert setting.ratio_noise() < 1e-6
    setting.update()
    assert setting.ratio_noise() > 1e-3


def test_old_log_probs_may_be_those_of_the_updates_micro_batches():
    weights, deviations = [], []
    for noise, old in ((0.0, "rollout"), (0.1, "rollout"), (0.1, "recompute")):
        setting = Setting(num_updates=2)
        log_probs = setting.trajectory.log_probs + noise * torch.linspace(-1, 1, NUM_TRANSITIONS).view(NUM_SAMPLES, -1)
        setting.trajectory = replace(setting.trajectory, log_probs=log_probs)
        setting.config = replace(setting.config, old_log_probs=old)
        deviations.append(setting.ratio_noise())
        setting.update()
        assert torch.equal(setting.trajectory.log_probs, log_probs)
        weights.append(setting.engine.full_weights())
    assert deviations[0] < 1e-6 and deviations[2] < 1e-6 < 1e-2 < deviations[1]
    assert difference(weights[2], weights[0]).abs().max() < 1e-6 < difference(weights[1], weights[0]).abs().max()


def test_one_update_a_rollout_recomputes_nothing():
    calls: list[str] = []
    for old in ("rollout", "recompute"):
        setting = Setting()
        setting.config = replace(setting.config, old_log_probs=old)
        setting.network.of_state.register_forward_hook(lambda *_: calls.append(old))  # noqa: B023
        setting.update()
    assert calls == ["rollout"] * 4 + ["recompute"] * 4


def test_transitions_without_a_signal_are_skipped_and_the_gradient_stays_the_same():
    quiet = ADVANTAGES * torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0])  # 3 of 8 samples: 6 of 16 transitions
    changes, metrics, calls = [], [], []
    for is_skipping in (True, False):
        setting = Setting(micro_batch_size=4, eps=1.0, lr=1.0)
        before = setting.engine.full_weights()
        forward = setting.network.of_state.register_forward_hook(lambda *_: calls.append(is_skipping))  # noqa: B023
        with pytest.MonkeyPatch.context() as patch:
            if not is_skipping:
                whole = "_micro_batches", lambda _, rows, signals: torch.arange(len(rows)).split(4)
                patch.setattr(RolloutUpdates, *whole)
            metrics.append(setting.update(quiet))
        forward.remove()
        changes.append(difference(setting.engine.full_weights(), before).double())
    assert (metrics[0].skipped, metrics[1].skipped) == (0.5, 0.0)  # 6 of 16 fill two micro-batches of 4
    assert (calls.count(True), calls.count(False)) == (2, 4)
    assert changes[1].norm() > 1e-3
    assert (changes[0] - changes[1]).norm() / changes[1].norm() < 1e-6


def test_a_kl_term_is_a_signal_of_its_own_so_nothing_is_skipped():
    setting = Setting(lr=1e-3)
    setting.update()
    assert setting.update(torch.zeros(NUM_SAMPLES), kl_weight=0.1).skipped == 0


def test_rebel_in_two_passes_has_the_gradient_of_its_loss():
    """In the second update log-probs have changed: autograd through the sum over steps of a pair, all in one graph."""
    setting = Setting(micro_batch_size=4, num_updates=2, eps=1.0, lr=1.0)
    rebel = Rebel(eta=0.5)
    seen: list[tuple[Tensor, dict[str, Tensor]]] = []
    train_on = RolloutUpdates.train_on

    def watched(work: Any, rows: Tensor, signals: Tensor) -> None:
        before = setting.engine.full_weights()
        train_on(work, rows, signals)
        seen.append((rows, before))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RolloutUpdates, "train_on", watched)
        metrics = setting.update(algorithm=rebel)
    rows, before = seen[1]
    network = TinyNetwork()
    network.load_state_dict(before)
    samples = (rows // 2).unique()  # whole pairs, in order
    every = setting.trajectory.transitions((samples[:, None] * 2 + torch.arange(2)).flatten())
    change = (policy_of(network).log_prob(every) - every.log_prob_old).reshape(-1, 2).sum(dim=1)
    first, second = change[0::2], change[1::2]
    rewards = ADVANTAGES[samples]
    loss = ((first - second) / rebel.eta - (rewards[0::2] - rewards[1::2])).square().mean()
    loss.backward()
    assert change.abs().max() > 1e-3, "the first update moved the log-probs"
    gradient = torch.cat([weight.grad.flatten() for weight in network.parameters() if weight.grad is not None])
    assert metrics.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-5)
