"""Each task's gradient, on a network of 300 weights: against that of an update, and beside an engine."""

# B samples, K actions: 8 x 2 transitions

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_policies import TinyNetwork, engine_of, policy_of, trajectory_of

from rlcm_fast.algorithms import PPO
from rlcm_fast.config import UpdateConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.task_gradients import TaskGradients
from rlcm_fast.stages.update import Updater

pytestmark = pytest.mark.usefixtures("one_process")
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 0.1, -0.4])


def measure(tasks: list[str], advantages: torch.Tensor = ADVANTAGES, **settings: Any) -> dict[str, torch.Tensor]:
    """Each task's gradient as one vector."""
    network = TinyNetwork()
    policy, config = policy_of(network), UpdateConfig(micro_batch_size=3, **settings)
    measured = TaskGradients(policy, PPO(), config, every=1, num_tasks=len(set(tasks)))
    gradients = measured.by_task(trajectory_of(policy, 8), advantages, tasks, torch.Generator().manual_seed(4))
    return {task: torch.cat([part.flatten() for part in gradient]) for task, gradient in gradients.items()}


@pytest.mark.parametrize("step_weights", ["equal", "sensitivity"])
def test_the_gradient_of_a_task_alone_is_that_of_the_update(step_weights: Any):
    network = TinyNetwork()
    engine = engine_of(network, 4)
    policy = policy_of(engine)
    config = UpdateConfig(micro_batch_size=4, step_weights=step_weights)
    updated = Updater(policy, PPO(), engine, config).update(trajectory_of(policy, 8), ADVANTAGES, Turn(0))
    (gradient,) = measure(["a"] * 8, step_weights=step_weights).values()
    assert gradient.norm().item() == pytest.approx(updated.grad_norm, rel=1e-5)


def test_tasks_share_out_the_gradient_of_all():
    tasks = ["a"] * 2 + ["b"] * 6
    (together,), apart = measure(["all"] * 8).values(), measure(tasks)
    assert (apart["a"] * 2 / 8 + apart["b"] * 6 / 8 - together).norm() < 1e-5 * together.norm()
    others = ADVANTAGES.clone()
    others[2:] = 7.0
    assert torch.equal(measure(tasks, others)["a"], apart["a"]), "of its own samples only"


@pytest.mark.parametrize("settings", [{"stage": 0}, {"stage": 1}, {"stage": 2}, {"in_backward": True}])
def test_measuring_between_updates_leaves_the_engine_alone(settings: dict[str, Any]):
    ends = []
    optimizer = "adamw_8bit" if "in_backward" in settings else "adamw"
    for is_measured in (False, True):
        network = TinyNetwork()
        engine = engine_of(network, 1, name=optimizer, **settings)
        policy = policy_of(engine)
        trajectory, config = trajectory_of(policy, 8), UpdateConfig(micro_batch_size=16)
        updater = Updater(policy, PPO(), engine, config)
        measured = TaskGradients(policy_of(network), PPO(), config, every=1, num_tasks=2)
        for iteration in range(2):
            if is_measured:
                measured.by_task(trajectory, ADVANTAGES, ["a", "b"] * 4, torch.Generator())
            updater.update(trajectory, ADVANTAGES, Turn(iteration))
        ends.append(engine.full_weights())
    assert all(torch.equal(value, ends[0][name]) for name, value in ends[1].items())
    assert not torch.equal(ends[0]["of_state.weight"], TinyNetwork().state_dict()["of_state.weight"])
