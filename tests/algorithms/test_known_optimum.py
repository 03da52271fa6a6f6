"""Every algorithm on a chain whose best policy is known: two Gaussian actions and an image, rewarded by nearness.

    x_1 = x_0 / 2 + B_0 m_0 + sigma_0 z,   x_2 = x_1 / 2 + B_1 m_1 + sigma_1 z,   image = x_2 / 2
    reward = -sum over C, H, W of (image - c)^2

with one number m_k for each step and channel: the best policy has E[image] = c. With a KL term of weight beta, means
over the D dimensions as the log-prob, it maximises -|E image - c|^2 - beta sum_k B_k^2 m_k^2 / (2 sigma_k^2).
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_policies import SCHEDULER, encode, engine_of, prompts
from torch import Tensor, nn

from rlcm_fast.algorithms import build_advantages, build_algorithm
from rlcm_fast.config import AdvantagesConfig, AlgorithmConfig, UpdateConfig
from rlcm_fast.parallel import Turn
from rlcm_fast.policies import GaussianPolicy, Network, consistency_schedule
from rlcm_fast.policies.consistency import ConsistencyPolicy
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update import Updater
from rlcm_fast.trajectory import Prompt

pytestmark = pytest.mark.usefixtures("one_process")
GOAL = torch.tensor([0.8, -0.5])
NUM_PROMPTS, PER_PROMPT = 16, 8
SCHEDULE = consistency_schedule(SCHEDULER, 3)
B, SIGMA = SCHEDULE.coefficients[:2, 1], SCHEDULE.coefficients[:2, 2]
REACH = B * torch.tensor([0.25, 0.5])  # of m_0 and m_1 on the mean image
UNET_CONFIG = {"in_channels": 2, "sample_size": 2, "time_cond_proj_dim": 16}


class Means(nn.Module):
    """The output that makes the next state's mean x_t / 2 + B_k m_k; the last step, which is no action, has m = 0."""

    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.zeros(3, 2))
        self.timesteps, self.coefficients = SCHEDULE.timesteps, SCHEDULE.coefficients

    def forward(self, x_t: Tensor, t: Tensor, **_: Any) -> tuple[Tensor]:
        step = (t[:, None] == self.timesteps).float().argmax(dim=1)
        a, b = self.coefficients[step, :2, None, None, None].unbind(dim=1)
        return (self.m[step][:, :, None, None] + x_t * (0.5 - a) / b,)


def policy_of(network: Any) -> GaussianPolicy:
    return ConsistencyPolicy(Network(network, UNET_CONFIG), SCHEDULE, 4.0)


def mean_image(network: Means) -> Tensor:
    """E[image] of each channel."""
    return (REACH @ network.m[:2]).detach()


def train(name: Any, kind: Any, num_iterations: int, scale: Any = "batch", **settings: Any) -> Means:
    """settings: of UpdateConfig, or lr."""
    network = Means()
    lr = settings.pop("lr", 0.03)
    config = UpdateConfig(clip_range=0.2, micro_batch_size=64, **settings)
    start_model = StartModel(policy_of(copy.deepcopy(network))) if config.kl_weight else None
    transitions = NUM_PROMPTS * PER_PROMPT * 2 // config.num_updates
    engine = engine_of(
        network, transitions // 64, lr=lr, final_lr_fraction=0.0, num_updates=num_iterations * config.num_updates
    )
    policy, algorithm = policy_of(engine), build_algorithm(AlgorithmConfig(name, eta=0.3), config)
    advantages = build_advantages(kind, AdvantagesConfig(kind, scale))
    texts = [Prompt(str(i)) for i in range(NUM_PROMPTS) for _ in range(PER_PROMPT)]
    generator = torch.Generator().manual_seed(0)
    updater = Updater(policy, algorithm, engine, config, start_model)
    for iteration in range(num_iterations):
        trajectory, image = policy.sample(encode(prompts(len(texts))), generator)
        rewards = -(image - GOAL[:, None, None]).square().flatten(1).sum(dim=1)
        weights = algorithm.sample_weights(advantages(rewards, texts))
        updater.update(trajectory, weights, Turn(iteration))
    return network


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("ppo", "batch", {"num_updates": 2}),
        ("ppo", "batch", {"num_timesteps": 1, "num_updates": 1}),
        ("ppo", "batch", {"order": "by_step", "num_updates": 2}),
        ("grpo", "group", {"num_updates": 2}),
        ("grpo", "leave_one_out", {}),
        ("reinforce", "batch", {}),
        ("rebel", "group", {"num_updates": 4}),
        ("rebel", "batch", {"num_passes": 2}),
        ("rwr", "batch", {"num_updates": 2}),
    ],
)
def test_the_mean_image_comes_to_the_goal(name: str, kind: str, settings: dict[str, Any]):
    network = train(name, kind, 80, **settings)
    assert (mean_image(network) - GOAL).norm() < 0.05
    assert not network.m[2].any()


def test_a_kl_term_stops_where_the_closed_form_says():
    beta = 0.5
    network = train("dpok", "leave_one_out", 150, scale="none", kl_weight=beta)
    cost = beta * (B / SIGMA).square()
    # d/dm of |reach m - c|^2 + cost m^2 / 2 = 0, a channel at a time
    best = torch.linalg.solve(2 * torch.outer(REACH, REACH) + torch.diag(cost), 2 * REACH[:, None] * GOAL)
    image = REACH @ best
    assert 0.2 < image.norm() / GOAL.norm() < 0.9, "the KL term should hold it back, not all the way"
    assert (mean_image(network) - image).norm() < 0.05
