"""The transcription of the paper's loop and our trainer do the same work: log-probs and gradients are equal."""

# B samples, H timesteps, K actions

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.speed.paper_loop import Habits, PaperLoop, Samples, consistency_step, steps_of
from rlcm_fast.algorithms import PPO, build_advantages
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import AdvantagesConfig, ModelConfig, PolicyConfig, UpdateConfig
from rlcm_fast.engine.base import Engine
from rlcm_fast.parallel import Turn
from rlcm_fast.policies import GaussianPolicy, Network, build_policy
from rlcm_fast.policies.consistency import guidance_embedding
from rlcm_fast.prompts import PromptSampler, Share
from rlcm_fast.stages.update import Updater
from rlcm_fast.trajectory import Conditioning, Prompt, Trajectory

H, B, CPU = 4, 6, torch.device("cpu")
ADVANTAGES = torch.tensor([1.5, -0.5, 12.0, 0.3, -1.0, 0.7])  # one beyond the clamp
UPDATE = UpdateConfig(micro_batch_size=3, max_grad_norm=0.0)


class GradientsOnly(Engine):
    """Accumulates as an engine does and never steps."""

    zero_stage = 0

    def __init__(self, network: torch.nn.Module, num_micro_batches: int) -> None:
        self._network, self._left = network, num_micro_batches

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._network(*arguments, **keywords)

    def begin_update(self, num_micro_batches: int) -> None:
        assert num_micro_batches == self._left

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> float | None:
        self._left -= 1
        return None if self._left else 0.0

    @property
    def lr(self) -> float:
        return 0.0

    def weights_are_finite(self) -> bool:
        return True

    def full_weights(self) -> dict[str, Tensor]:
        return {}

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@pytest.fixture(scope="module")
def backbone(tiny_lcm_folder: str) -> Backbone:
    return Backbone.load(ModelConfig(tiny_lcm_folder), CPU, torch.float32, kind="consistency")


@pytest.fixture(scope="module")
def conditioning(backbone: Backbone) -> Conditioning:
    return backbone.encode([Prompt(f"{i % 2} cats") for i in range(B)], with_negative=False)


def policy_of(backbone: Backbone, last_step: Any, unet: Any = None) -> GaussianPolicy:
    config = PolicyConfig(num_steps=H, last_step=last_step)
    unet = unet or copy.deepcopy(backbone.unet)
    return build_policy(config, Network(unet, backbone.unet.config), backbone.scheduler_config)


def loop_of(backbone: Backbone, **habits: Any) -> PaperLoop:
    unet = copy.deepcopy(backbone.unet)
    policy = policy_of(backbone, "renoise")
    return PaperLoop(
        unet=unet,
        steps=steps_of(backbone.scheduler_config, H),
        guidance=guidance_embedding(policy.guidance_scale, backbone.unet.config["time_cond_proj_dim"]),
        latent_shape=policy.latent_shape,
        prompts=PromptSampler([Prompt("0 cats"), Prompt("1 cats")], Share(2, B // 2, seed=0)),
        encode=lambda prompts: backbone.encode(prompts, with_negative=False),
        decode=backbone.decode,
        rewards=[],
        advantages=build_advantages("prompt", AdvantagesConfig(buffer_size=16, min_count=16)),
        optimizer=torch.optim.AdamW(unet.parameters()),
        update=UPDATE,
        sampling_batch_size=B,
        generator=torch.Generator().manual_seed(5),
        habits=Habits(**habits),
    )


def gradient_of(network: torch.nn.Module) -> Tensor:
    """All gradients of it in one vector."""
    return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def our_gradient(backbone: Backbone, trajectory: Trajectory, last_step: str) -> Tensor:
    network = copy.deepcopy(backbone.unet)
    engine = GradientsOnly(network, trajectory.num_transitions // UPDATE.micro_batch_size)
    policy = policy_of(backbone, last_step, engine)
    weights = PPO().sample_weights(ADVANTAGES)  # clamped, as the trainer has them
    Updater(policy, PPO(), engine, UPDATE).update(trajectory, weights, Turn(0))
    return gradient_of(network)


def trajectory_of(samples: Samples, num_actions: int) -> Trajectory:
    return Trajectory(samples.states[:, : num_actions + 1], samples.log_probs[:, :num_actions], samples.conditioning)


@pytest.mark.parametrize("one_by_one", [True, False])
def test_both_draw_the_same_images_with_the_same_log_probs(backbone, conditioning, one_by_one: bool):
    theirs = loop_of(backbone, steps_one_by_one=one_by_one).sample(conditioning)
    ours, x_0 = policy_of(backbone, "renoise").sample(conditioning, torch.Generator().manual_seed(5))
    torch.testing.assert_close(theirs.states, ours.latents, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.x_0, x_0, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs.log_probs, ours.log_probs, rtol=1e-5, atol=1e-5)


def test_log_probs_of_given_actions_are_our_policys(backbone, conditioning):
    loop, policy = loop_of(backbone), policy_of(backbone, "renoise")
    samples = loop.sample(conditioning)
    ours = policy.log_prob(trajectory_of(samples, H).transitions(torch.arange(B * H))).view(B, H)
    for k, step in enumerate(loop.steps):
        eps = loop._network(k, samples.states[:, k], conditioning.embeds)
        _, _, theirs = consistency_step(step, eps, samples.states[:, k], x_s=samples.states[:, k + 1])
        torch.testing.assert_close(theirs, ours[:, k], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("habits", "last_step"),
    [
        ({}, "renoise"),
        ({"trains_last_action": False}, "deterministic"),
        ({"steps_one_by_one": False}, "renoise"),
        ({"samples_per_forward": B}, "renoise"),
        ({"samples_per_forward": 4, "steps_one_by_one": False, "trains_last_action": False}, "deterministic"),
    ],
)
def test_accumulated_gradients_are_equal_to_1e_5(backbone, conditioning, habits: dict[str, Any], last_step: str):
    loop = loop_of(backbone, **habits)
    samples = loop.sample(conditioning)
    loop.accumulate(samples, ADVANTAGES)
    theirs = gradient_of(loop.unet)
    ours = our_gradient(backbone, trajectory_of(samples, H - (last_step == "deterministic")), last_step)
    assert ours.norm() > 1e-3
    assert (theirs - ours).norm() <= 1e-5 * ours.norm()


def test_an_iteration_takes_one_step_and_counts_its_network_calls(backbone):
    from rlcm_fast.rewards import build_reward

    loop = loop_of(backbone)
    loop.rewards = [(build_reward("jpeg_compressibility", {}), 1.0)]
    loop.clock.watch(loop.unet)
    before = [p.detach().clone() for p in loop.unet.parameters()]
    loop.iteration()
    assert any(not torch.equal(p, q) for p, q in zip(loop.unet.parameters(), before, strict=True))
    seconds, calls = loop.clock.read()
    assert calls == {"sampling: network": [B] * H, "training: network": [2] * (H * B // 2)}
    assert all(spent > 0 for spent in seconds.values())


def test_another_prediction_is_refused(backbone):
    with pytest.raises(ValueError, match="prediction_type=v_prediction"):
        steps_of({**backbone.scheduler_config, "prediction_type": "v_prediction"}, H)
