"""What bench_peers.py measures: the paper's loop and its ladder from a config, our trainer with a clock on it."""

from __future__ import annotations

import copy
import gzip
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.shared.stage_clock import StageClock
from benchmarks.speed.paper_loop import Habits, PaperLoop, steps_of
from rlcm_fast.algorithms import build_advantages
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config
from rlcm_fast.engine.optimizers import build_optimizer
from rlcm_fast.policies import Network
from rlcm_fast.policies.consistency import guidance_embedding
from rlcm_fast.prompts import PromptSampler, Share, load_prompts
from rlcm_fast.rewards import Reward, build_reward
from rlcm_fast.trainer import Trainer
from rlcm_fast.trajectory import Prompt

PAPER = "paper_loop"


def ladder(config: Config) -> dict[str, PaperLoop]:
    """The paper's loop first, then what it becomes as one habit after another is given up."""
    size = min(config.update.micro_batch_size, config.prompts.num_prompts * config.prompts.images_per_prompt)
    some = min(8, size)
    habits = {
        PAPER: Habits(),
        "scheduler steps of all samples together": Habits(steps_one_by_one=False),
        "last action not trained": Habits(steps_one_by_one=False, trains_last_action=False),
        f"{some} samples a forward": Habits(some, steps_one_by_one=False, trains_last_action=False),
        f"{size} samples a forward": Habits(size, steps_one_by_one=False, trains_last_action=False),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backbone = Backbone.load(config.model, device, torch.float32, kind="consistency")
    return {name: _loop(config, backbone, chosen) for name, chosen in habits.items()}


def _loop(config: Config, backbone: Backbone, habits: Habits) -> PaperLoop:
    """The paper's loop with weights of its own, and as much of the config as it knows."""
    # The network again, and what describes its sampler.
    unet, device = copy.deepcopy(backbone.unet), backbone.device
    advantages = config.advantages

    # The loop around it, watched by its clock.
    loop = PaperLoop(
        unet=unet,
        steps=steps_of(backbone.scheduler_config, config.policy.num_steps),
        guidance=guidance_embedding(config.policy.guidance_scale, unet.config["time_cond_proj_dim"]).to(device),
        latent_shape=Network(unet, unet.config).latent_shape,
        prompts=PromptSampler(
            load_prompts(config.prompts.source),
            Share(config.prompts.num_prompts, config.prompts.images_per_prompt, config.seed),
        ),
        encode=lambda prompts: backbone.encode(prompts, with_negative=False),
        decode=backbone.decode,
        rewards=rewards_of(config),
        advantages=build_advantages(advantages.kind, advantages),
        optimizer=build_optimizer(unet, config.optimizer, config.engine, config.seed),
        update=config.update,
        sampling_batch_size=config.rollout.micro_batch_size,
        generator=torch.Generator().manual_seed(config.seed),
        habits=habits,
    )
    loop.clock.watch(unet)
    return loop


def rewards_of(config: Config) -> list[tuple[Reward, float]]:
    """Each with its weight."""
    return [(build_reward(reward.name, reward.arguments), reward.weight) for reward in config.rewards]


def some_prompts(config: Config) -> Sequence[Prompt]:
    """Returns as many prompts as an iteration has."""
    return load_prompts(config.prompts.source)[: config.prompts.num_prompts]


def watched(trainer: Trainer) -> StageClock:
    """A clock on the stages of a trainer's iterations."""
    clock = StageClock()
    clock.watch(trainer.images.backbone.unet)
    clock.wrap(trainer.images.policy, "sample", "sampling: rest")
    clock.wrap(trainer.images.backbone, "decode", "decode")
    clock.wrap(trainer.tasks.rewards, "gather", "reward")
    clock.wrap(trainer.engine, "backward", "training: backward")
    clock.wrap(trainer.engine, "step", "training: optimizer")
    clock.wrap(trainer.updater, "update", "training: rest")
    return clock


def new_profiler() -> profile:
    """A profiler of the processor, and of the GPU if there is one."""
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return profile(activities=[ProfilerActivity.CPU, *gpu])


def export(profiler: profile, path: Path) -> dict[str, int]:
    """Writes the trace, compressed; how many operators and autograd nodes it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    with gzip.open(path, "rt", encoding="utf-8") as file:  # key_averages() would take gigabytes and minutes
        return {"operators": sum('"cat": "cpu_op"' in line for line in file)}
