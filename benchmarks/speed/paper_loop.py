"""One iteration of RLCM (arXiv 2404.03673, algorithm 1) as its authors run it: our own transcription in plain torch.

    sample     the batch together, but the scheduler's step for one sample after another
    reward     decode, score on the host, normalise per prompt
    train      for each two samples, for each of the H timesteps: forward, steps one by one, clipped ratio, backward;
               then one optimizer step

What makes it slow has a name in `Habits` and can be switched off alone: small forwards, steps one by one, the last
action trained. Nothing else is slower than it need be; for the comparison with our trainer to be of equal work, model,
dtype, optimizer, rewards, advantages and the batches of sampling and decoding are ours. In its favour, the authors' own
code does these and this does not:
 1. read a coefficient off the device for every step of every sample;
 2. encode the prompts anew in each iteration;
 3. write metrics.

The timesteps, alpha_bar and c_skip, c_out come from diffusers' LCMScheduler, not from rlcm_fast.policies, so that the
equality of log-probs and gradients in tests/benchmarks/speed/test_paper_loop.py is between two derivations.
"""

# B samples, H timesteps, N rows of a step, C H W latent

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import LCMScheduler
from torch import Tensor

from benchmarks.shared.stage_clock import StageClock
from rlcm_fast.algorithms.advantages import Advantages
from rlcm_fast.config import UpdateConfig
from rlcm_fast.prompts import PromptSampler
from rlcm_fast.rewards import Reward
from rlcm_fast.trajectory import Conditioning, Prompt

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Habits:
    """What the authors' loop does that ours does not."""

    samples_per_forward: int = 2  # of one timestep, in training
    steps_one_by_one: bool = True
    trains_last_action: bool = True


@dataclass(frozen=True)
class Step:
    """The numbers of one timestep."""

    timestep: int
    alpha_bar_t: float
    alpha_bar_s: float  # of the next timestep; of its own after the last
    c_skip: float
    c_out: float


@dataclass(frozen=True)
class Samples:
    """What a rollout stores."""

    states: Tensor  # (B, H + 1, C, H, W) float32
    log_probs: Tensor  # (B, H) float32
    x_0: Tensor  # (B, C, H, W) float32, the images' latents
    conditioning: Conditioning


def steps_of(scheduler_config: Mapping[str, Any], num_steps: int) -> list[Step]:
    """The H steps, noisiest first.

    Raises:
        ValueError: the network does not predict eps.
    """
    scheduler: Any = LCMScheduler.from_config(dict(scheduler_config))
    if scheduler.config.prediction_type != "epsilon":
        raise ValueError(f"prediction_type={scheduler.config.prediction_type}: the paper's loop is for epsilon")
    scheduler.set_timesteps(num_steps)
    timesteps = scheduler.timesteps.tolist()
    steps = []
    for t, s in zip(timesteps, [*timesteps[1:], timesteps[-1]], strict=True):
        c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
        alpha_bar_t, alpha_bar_s = scheduler.alphas_cumprod[[t, s]].tolist()
        steps.append(Step(t, alpha_bar_t, alpha_bar_s, float(c_skip), float(c_out)))
    return steps


def consistency_step(
    step: Step, eps: Tensor, x_t: Tensor, noise: Tensor | None = None, x_s: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """x_s, f (N, C, H, W each) and log_prob (N,), of the action given or, with noise, of the one it makes."""
    x_0 = (x_t - math.sqrt(1 - step.alpha_bar_t) * eps) / math.sqrt(step.alpha_bar_t)
    f = step.c_skip * x_t + step.c_out * x_0
    mean, sigma = math.sqrt(step.alpha_bar_s) * f, math.sqrt(1 - step.alpha_bar_s)
    if x_s is None:
        assert noise is not None
        x_s = mean + sigma * noise
    density = -((x_s - mean) ** 2) / (2 * sigma**2) - math.log(sigma) - _HALF_LOG_TWO_PI
    return x_s, f, density.mean(dim=(1, 2, 3))


@dataclass
class PaperLoop:
    """`iteration()` is one of it; the network is called as UNet2DConditionModel is."""

    unet: torch.nn.Module
    steps: list[Step]
    guidance: Tensor  # (1, W), the embedding that the network takes
    latent_shape: tuple[int, int, int]
    prompts: PromptSampler
    encode: Callable[[Sequence[Prompt]], Conditioning]
    decode: Callable[[Tensor], Tensor]
    rewards: list[tuple[Reward, float]]  # each with its weight
    advantages: Advantages
    optimizer: torch.optim.Optimizer
    update: UpdateConfig
    sampling_batch_size: int
    generator: torch.Generator
    habits: Habits = field(default_factory=Habits)
    clock: StageClock = field(default_factory=StageClock)

    def iteration(self) -> None:
        """Sample, reward, train: one optimizer step."""
        prompts = self.prompts.next_batch()
        samples = self.sample(self.encode(prompts))
        advantages = self.advantages(self.reward(samples.x_0, prompts), prompts)
        with self.clock.stage("training: rest"):
            self.accumulate(samples, advantages.to(samples.states.device))
        with self.clock.stage("training: optimizer"):
            torch.nn.utils.clip_grad_norm_(self.unet.parameters(), self.update.max_grad_norm or float("inf"))
            self.optimizer.step()
            self.optimizer.zero_grad()

    @torch.no_grad()
    def sample(self, conditioning: Conditioning) -> Samples:
        """One trajectory for each sample of the conditioning."""
        rows = torch.arange(len(conditioning.index), device=conditioning.index.device)
        with self.clock.stage("sampling: rest"):
            parts = [self._sample_batch(conditioning.take(part)) for part in rows.split(self.sampling_batch_size)]
            states, log_probs, x_0 = map(torch.cat, zip(*parts, strict=True))
        return Samples(states, log_probs, x_0, conditioning)

    def _sample_batch(self, conditioning: Conditioning) -> tuple[Tensor, Tensor, Tensor]:
        embeds = conditioning.embeds
        x_t = f = self._noise(embeds)
        states, log_probs = [x_t], []
        for k in range(len(self.steps)):
            x_t, f, log_prob = self._step(k, self._network(k, x_t, embeds), x_t, noise=self._noise(embeds))
            states.append(x_t)
            log_probs.append(log_prob)
        return torch.stack(states, dim=1), torch.stack(log_probs, dim=1), f

    def reward(self, x_0: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """(B,) float32 on the CPU, the weighted sum of all rewards."""
        with self.clock.stage("decode"):
            images = torch.cat([self.decode(part) for part in x_0.split(self.sampling_batch_size)])
        with self.clock.stage("reward"):
            return torch.stack([weight * reward(images, prompts).cpu() for reward, weight in self.rewards]).sum(dim=0)

    def accumulate(self, samples: Samples, advantages: Tensor) -> None:
        """Adds the gradient of the mean loss over all actions; advantages (B,)."""
        advantages = advantages.clamp(-self.update.advantage_clip, self.update.advantage_clip)
        actions = range(len(self.steps) - (not self.habits.trains_last_action))
        batches = torch.arange(len(advantages), device=advantages.device).split(self.habits.samples_per_forward)
        for rows in batches:
            embeds = samples.conditioning.take(rows).embeds
            states, old, advantage = samples.states[rows], samples.log_probs[rows], advantages[rows]
            for k in actions:
                eps = self._network(k, states[:, k], embeds)
                _, _, log_prob = self._step(k, eps, states[:, k], x_s=states[:, k + 1])
                ratio = (log_prob - old[:, k]).exp()
                clipped = ratio.clamp(1 - self.update.clip_range, 1 + self.update.clip_range)
                loss = torch.maximum(-advantage * ratio, -advantage * clipped).sum()
                with self.clock.stage("training: backward"):
                    (loss / (len(advantages) * len(actions))).backward()

    def _network(self, k: int, x_t: Tensor, embeds: Tensor) -> Tensor:
        timestep = torch.full((len(x_t),), self.steps[k].timestep, device=x_t.device)
        guidance = self.guidance.expand(len(x_t), -1)
        return self.unet(x_t, timestep, encoder_hidden_states=embeds, timestep_cond=guidance, return_dict=False)[0]

    def _step(self, k: int, eps: Tensor, x_t: Tensor, **given: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`consistency_step`, of all rows or of one after another."""
        step = self.steps[k]
        if not self.habits.steps_one_by_one:
            return consistency_step(step, eps, x_t, **given)
        rows = []
        for i in range(len(x_t)):
            row = slice(i, i + 1)
            given_here = {name: tensor[row] for name, tensor in given.items()}
            rows.append(consistency_step(step, eps[row], x_t[row], **given_here))
        x_s, f, log_prob = map(torch.cat, zip(*rows, strict=True))
        return x_s, f, log_prob

    def _noise(self, embeds: Tensor) -> Tensor:
        noise = torch.randn(len(embeds), *self.latent_shape, generator=self.generator, device=self.generator.device)
        return noise.to(embeds.device)
