"""The loop: sample images, reward them, make good actions likelier; top to bottom in `Trainer.run`.

    prompts -> rollout (trajectory, rewards) -> advantages -> update -> metrics [-> evaluation, grid, checkpoint]

RLCM (arXiv 2404.03673, algorithm 1): the multistep consistency sampler is an MDP whose actions are the next latents and
whose only reward is the decoded image's. Departures from the paper:
 1. The last, deterministic step is no action (policy.last_step=renoise has the paper's letter).
 2. A micro-batch mixes steps, and transitions are shuffled over samples and steps.
 3. With one update a rollout the ratio is 1 by construction (the paper's code clips rounding noise).
"""

# B samples of this process, A of all processes

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import PPO, build_advantages
from rlcm_fast.backbones.acceleration import accelerate, check_device
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from rlcm_fast.config import Config
from rlcm_fast.engines import build_engine
from rlcm_fast.evaluation import build_evaluator, draw, grid_prompts
from rlcm_fast.interruption import Interrupted, Interruption
from rlcm_fast.kernels import dispatch
from rlcm_fast.memory.processes import init_processes
from rlcm_fast.memory.report import MemoryReport
from rlcm_fast.policies import GaussianPolicy, build_policy
from rlcm_fast.prompts import PromptSampler, load_prompts
from rlcm_fast.rewards import RewardService, build_rewards
from rlcm_fast.rollout import Rollout, rollout
from rlcm_fast.tracking import Tracker
from rlcm_fast.trajectory import Conditioning, Prompt
from rlcm_fast.update import UpdateMetrics, ratio_noise, update


class Trainer:
    """One run of one process; with several, each holds its share of the prompts and all stay in step."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = Path(config.run_dir)
        self.device = init_processes()
        dispatch.set_default(config.engine.kernels)
        dispatch.is_triton(torch.empty(0, device=self.device))  # refuses what cannot run, before weights load
        check_device(config.engine, self.device)
        self.iteration, self.queries = 0, 0
        checkpoint = find_checkpoint(config.resume, self.run_dir) if config.resume else None
        self._refuse_to_overwrite()
        self.memory = MemoryReport(config, self.device)  # plans while weights load
        torch.manual_seed(config.seed)

        dtype = torch.float32 if config.engine.dtype == "fp32" else torch.bfloat16
        self.backbone = Backbone.load(
            config.model,
            self.device,
            dtype,
            is_consistency=config.policy.kind == "consistency",
            offload_idle=config.engine.offload_idle,
            decode_batch_size=config.rollout.decode_batch_size,
        )
        if config.lora.rank > 0:
            self.backbone.add_adapters(config.lora)
        self.reference = self._frozen_start() if config.update.kl_weight > 0 else None
        self.engine = build_engine(self.backbone.unet, config, parallel.world_size())
        self.policy = self._build_policy(self.engine)

        self.prompts = self._build_prompts()
        trained = build_rewards(config.rewards)
        self.rewards = RewardService(trained, config.rollout.reward_workers)
        self.advantages = build_advantages(
            config.advantages.kind, config.advantages.buffer_size, config.advantages.min_count
        )
        self.algorithm = PPO(config.update.clip_range, config.update.advantage_clip)
        self.evaluator = build_evaluator(config.evaluation, trained, self.encode, self.backbone.decode)
        self.grid_prompts = grid_prompts(config.evaluation, config.tracking.grid_images)
        if checkpoint:
            self.load_state_dict(load_checkpoint(checkpoint, self.engine))
        self.tracker = Tracker(self.run_dir, config, self.iteration)

    def run(self) -> None:
        """Trains to `num_iterations` and exports; Ctrl-C or SIGTERM save a checkpoint and stop early."""
        config = self.config
        with Interruption() as self.interruption:
            try:
                self.memory.verdict(self.tracker.say)
                for iteration in range(self.iteration, config.num_iterations):
                    self.unfinished = self.state_dict()
                    evaluated = self.evaluate(iteration)
                    self.memory.begin()
                    start = time.perf_counter()
                    prompts = self.prompts.next_batch()  # list[Prompt], len B
                    batch = self.rollout(prompts, iteration)  # no grad
                    advantages = self.shared_advantages(batch, prompts)  # (B,)
                    noise = self.check_ratio(batch) if iteration == 0 else {}
                    lr = self.engine.lr
                    updated = self.update(batch, advantages, iteration)
                    self.iteration, self.queries = iteration + 1, self.queries + self.num_samples
                    seconds = _seconds(batch, updated, time.perf_counter() - start, self.num_samples)
                    head = {"iteration": iteration, "queries": self.queries, "lr": lr}
                    stages = {**batch.metrics(), **updated.metrics(advantages), **self.engine.metrics()}
                    self.tracker.log({**head, **stages, **noise, **seconds, **self.memory.metrics(), **evaluated})
                    self.memory.compare(self.tracker.say)
                    self.save_if_due()
                self.finish()
            except Interrupted:
                self.load_state_dict(self.unfinished)
                self.save()
                self.tracker.say(f"stopped after {self.iteration} iterations; go on with --resume latest")
            finally:
                self.rewards.shutdown()
                self.tracker.close()

    def rollout(self, prompts: list[Prompt], iteration: int) -> Rollout:
        """Samples, decodes and rewards this process's B prompts."""
        return rollout(
            self.policy,
            prompts,
            self.encode,
            self.backbone.decode,
            self.rewards,
            parallel.generator(self.config.seed, 1, parallel.rank(), iteration),
            self.config.rollout.micro_batch_size,
            iteration,
            self.interruption.check,
        )

    def shared_advantages(self, batch: Rollout, prompts: list[Prompt]) -> Tensor:
        """This process's advantages (B,), from the rewards and statistics of all."""
        rewards = parallel.all_gather(batch.rewards.total)  # (A,)
        advantages = self.advantages(rewards, parallel.all_gather_list(prompts))  # (A,)
        first = parallel.rank() * len(prompts)
        return advantages[first : first + len(prompts)].to(self.device)

    def update(self, batch: Rollout, advantages: Tensor, iteration: int) -> UpdateMetrics:
        """The optimizer steps on this rollout."""
        return update(
            self.policy,
            self.algorithm,
            batch.trajectory,
            advantages,
            self.engine,
            self.config.update,
            parallel.generator(self.config.seed, 2, parallel.rank(), iteration),
            self.reference,
            self.interruption.check,
        )

    def check_ratio(self, batch: Rollout) -> dict[str, float]:
        """Before the first update every ratio should be 1; what is left is rounding, and no clip should act on it."""
        generator = parallel.generator(self.config.seed, 3, parallel.rank())
        noise = ratio_noise(self.policy, batch.trajectory, self.config.update.micro_batch_size, generator)
        noise = max(parallel.all_gather_list([noise]))
        clip_range = self.config.update.clip_range
        if noise >= clip_range:
            self.tracker.say(
                f"warning: rounding alone moves the ratio by {noise:.1e}, as much as update.clip_range={clip_range}: "
                "clipping will act on noise; raise it above the noise, or set engine.dtype=fp32"
            )
        return {"ratio/noise_floor": noise}

    def evaluate(self, iteration: int) -> dict[str, float]:
        """Scores held-out images and draws the grid, where one is due; of the weights after `iteration` iterations."""
        config = self.config
        is_scored = self._due(config.evaluation.every, iteration)
        is_drawn = self._due(config.tracking.grid_every, iteration)
        if not (is_scored or is_drawn):
            return {}
        with self.engine.averaged():
            if is_drawn:
                texts = [prompt.text for prompt in self.grid_prompts]
                sample = (config.evaluation.seed, len(texts), self.encode, self.backbone.decode)
                images, _ = draw(self.policy, self.grid_prompts, *sample)
                self.tracker.grid(iteration, images, texts)
            return self.evaluator(self.policy, iteration) if is_scored else {}

    def finish(self) -> None:
        """The evaluation of the final weights, and a folder that stock diffusers loads."""
        evaluated = self.evaluate(self.iteration)
        if evaluated:
            self.tracker.log({"iteration": self.iteration, "queries": self.queries, **evaluated})
        weights = self.engine.final_weights()
        if parallel.is_main():
            self.backbone.export(weights, self.run_dir / "export")
            if self.config.lora.rank > 0:
                self.backbone.export_adapters(weights, self.run_dir / "lora")
        adapters = f"; {self.run_dir}/lora its adapters for load_lora_weights" if self.config.lora.rank > 0 else ""
        self.tracker.say(
            f"done: {self.run_dir}/export is a diffusers folder{adapters}; {self.run_dir}/metrics.jsonl the curves"
        )

    def save_if_due(self) -> None:
        """A checkpoint every so often, at the end and where any process was asked to stop."""
        stop = self.interruption.agreed()
        is_last = self.iteration == self.config.num_iterations
        if is_last or self._due(self.config.checkpoint.every, self.iteration):
            self.save()
        if stop and not is_last:
            self.unfinished = self.state_dict()
            raise Interrupted

    def save(self) -> None:
        """Writes a checkpoint of the finished iterations."""
        save_checkpoint(self.run_dir, self.iteration, self.engine, self.state_dict(), self.config.checkpoint.keep)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs besides weights and optimizer, as JSON; random numbers need nothing."""
        return {
            "iteration": self.iteration,
            "queries": self.queries,
            "prompts": self.prompts.state_dict(),
            "advantages": self.advantages.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.iteration, self.queries = state["iteration"], state["queries"]
        self.prompts.load_state_dict(state["prompts"])
        self.advantages.load_state_dict(state["advantages"])

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The prompts' text encodings, each distinct text encoded once in the run."""
        return self.backbone.encode(prompts, with_negative=self.policy.needs_negative)

    def _build_policy(self, unet: Any) -> GaussianPolicy:
        config = self.config.policy
        backbone = self.backbone
        return build_policy(config, unet, backbone.unet.config, backbone.scheduler_config, backbone.dtype, self.device)

    def _frozen_start(self) -> GaussianPolicy:
        """The start model as a policy of its own, outside of the engine, for the KL term."""
        start = self.backbone.frozen_start()
        if self.config.lora.rank == 0:  # with adapters it is the trained network itself
            accelerate(start, self.config.engine)
        return self._build_policy(start)

    def _build_prompts(self) -> PromptSampler:
        config, world_size = self.config, parallel.world_size()
        return PromptSampler(
            load_prompts(config.prompts.source),
            config.prompts.num_prompts // world_size,
            config.prompts.images_per_prompt,
            config.seed,
            parallel.rank(),
            world_size,
        )

    @property
    def num_samples(self) -> int:
        """Of an iteration, over all processes."""
        return self.config.prompts.num_prompts * self.config.prompts.images_per_prompt

    def _due(self, every: int, iteration: int) -> bool:
        """Every so often and for the final weights; never where `every` is 0."""
        return every > 0 and (iteration % every == 0 or iteration == self.config.num_iterations)

    def _refuse_to_overwrite(self) -> None:
        if self.config.resume is None and (self.run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"run_dir={self.run_dir} already holds a run; go on with --resume latest, or give another --run_dir"
            )


def _seconds(batch: Rollout, updated: UpdateMetrics, iteration_seconds: float, num_samples: int) -> dict[str, float]:
    return {
        "seconds/rollout": batch.seconds,
        "seconds/reward_wait": batch.rewards.wait_seconds,
        "seconds/update": updated.seconds,
        "seconds/iteration": iteration_seconds,
        "images_per_second": num_samples / iteration_seconds,
    }
