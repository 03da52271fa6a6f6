"""Updates of a tiny bfloat16 network under the engine without DeepSpeed, by graphs of a recorder or without."""

# B samples, K actions: 8 x 2 transitions

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from recorded_work import CpuRecorder
from tiny_policies import TinyNetwork, encode, engine_of, policy_of, prompts, trajectory_of
from torch import Tensor

from rlcm_fast.algorithms import PPO
from rlcm_fast.config import EmaConfig, UpdateConfig
from rlcm_fast.engine.averaging import WeightAverage
from rlcm_fast.engine.base import Engine
from rlcm_fast.graphs import Graphs
from rlcm_fast.parallel import Turn
from rlcm_fast.stages.graphed_update import GraphedUpdate
from rlcm_fast.stages.start_model import StartModel
from rlcm_fast.stages.update import Updater
from rlcm_fast.trajectory import AnyTrajectory, MixedTrajectory, Trajectory

ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, -2.0, 0.1, -0.4])
WIDTHS = 8, 12  # of the latents of the two image sizes


class Setting:
    """A network, its engine and what updates it."""

    def __init__(self, is_graphed: bool, kl_weight: float = 0.0, recorder: Any = None, **update: Any) -> None:
        """recorder: a CpuRecorder if there is none; what it cannot record is an error then."""
        must_work, self.recorder, self.said = recorder is None, recorder or CpuRecorder(), list[str]()
        self.network = TinyNetwork().bfloat16()
        self.config = UpdateConfig(clip_range=1e-2, kl_weight=kl_weight, **update)
        size = self.config.micro_batch_size
        self.engine = engine_of(self.network, -(-16 // size), 0, "pure_bf16", name="adamw_8bit", lr=1e-3)
        self.policy = policy_of(self.engine, dtype=torch.bfloat16)
        algorithm = PPO(clip_range=1e-2)
        graphed = None
        if is_graphed:
            assert self.engine.graph_problem == ""
            graphs, gradients = Graphs(self.recorder, self.said.append, must_work), self.engine.hold_gradients()
            graphed = GraphedUpdate(graphs, self.policy, algorithm, self.engine, self.config, gradients)
        self.updater = Updater(self.policy, algorithm, self.engine, self.config, self._start_model(), graphed=graphed)

    def _start_model(self) -> StartModel | None:
        if not self.config.kl_weight:
            return None
        if self.config.kl_reference == "offload":
            return StartModel(self.policy, WeightAverage(self.network, EmaConfig(device="cpu")).applied)
        return StartModel(policy_of(TinyNetwork(1).bfloat16(), dtype=torch.bfloat16))

    def update(self, seed: int = 4, advantages: Tensor = ADVANTAGES) -> Any:
        trajectory = trajectory_of(policy_of(TinyNetwork().bfloat16(), dtype=torch.bfloat16), 8, seed)
        return self.update_on(trajectory, seed, advantages)

    def update_on(self, trajectory: AnyTrajectory, seed: int = 4, advantages: Tensor = ADVANTAGES) -> Any:
        return replace(self.updater.update(trajectory, advantages, Turn(0, seed=seed)), seconds=0)

    def gradients(self) -> list[Tensor]:
        return [weight.grad for weight in self.network.parameters() if weight.grad is not None]


def same_weights(first: Engine, second: Engine) -> bool:
    one, other = first.full_weights(), second.full_weights()
    return all(torch.equal(one[name], other[name]) for name in one)


def mixed_trajectory(sizes: list[int], seed: int) -> MixedTrajectory:
    """Draws 8 samples; sizes: of each, the index of its width."""
    policy, parts, samples = policy_of(TinyNetwork().bfloat16(), dtype=torch.bfloat16), list[Trajectory](), []
    for size, width in enumerate(WIDTHS):
        of_size = torch.tensor([sample for sample in range(8) if sizes[sample] == size])
        conditioning = replace(encode(prompts(8)).take(of_size), latent_size=(8, width))
        parts.append(policy.sample(conditioning, torch.Generator().manual_seed(seed))[0])
        samples.append(of_size)
    return MixedTrajectory(parts, samples)
