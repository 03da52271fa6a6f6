"""The loop: sample images, reward them, make good actions likelier; top to bottom in `Trainer.run`.

    prompts -> rollout (trajectory, rewards) -> advantages -> update -> metrics [-> evaluation, grid, checkpoint]

once an iteration, or once for each task in turn (large-scale RL for diffusion models, arXiv 2401.12244).

RLCM (arXiv 2404.03673, algorithm 1): the multistep consistency sampler is an MDP whose actions are the next latents and
whose only reward is the decoded image's. Departures from the paper:
 1. The last, deterministic step is no action (policy.last_step=renoise has the paper's letter).
 2. A micro-batch mixes steps, and transitions are shuffled over samples and steps.
 3. With one update a rollout the ratio is 1 by construction (the paper's code clips rounding noise).
"""

# B samples of this process, A of all processes

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.algorithms import build_algorithm
from rlcm_fast.backbones.acceleration import check_device
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.build import build_engine, start_network
from rlcm_fast.config import Config
from rlcm_fast.engine.processes import init_processes
from rlcm_fast.kernels import dispatch
from rlcm_fast.planner.report import MemoryReport
from rlcm_fast.policies import GaussianPolicy, build_policy
from rlcm_fast.run_folder.checkpoint import agreed_checkpoint, load_checkpoint, save_checkpoint
from rlcm_fast.run_folder.interruption import Interrupted, Interruption
from rlcm_fast.run_folder.tracking import Tracker, merged
from rlcm_fast.stages.evaluation import build_evaluators, drawn, grid_prompts
from rlcm_fast.stages.real_images import Pretraining, check_pairs
from rlcm_fast.stages.rollout import Rollout, rollout
from rlcm_fast.stages.start_model import build_reference
from rlcm_fast.stages.task_gradients import Gradient, gradient_metrics, gradients_by_task
from rlcm_fast.stages.update import UpdateMetrics, ratio_noise, update
from rlcm_fast.tasks import Tasks
from rlcm_fast.trajectory import Conditioning, Prompt


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
        self.gradients: dict[str, Gradient] = {}
        checkpoint = agreed_checkpoint(config.resume, self.run_dir) if config.resume else None
        self._refuse_to_overwrite()
        self.memory = MemoryReport(config, self.device)  # plans while weights load
        self.tasks = Tasks(config, parallel.rank(), parallel.world_size())
        check_pairs(config)
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
        start = start_network(self.backbone, config)
        self.engine = build_engine(self.backbone.unet, config, parallel.world_size())
        self.policy = self._build_policy(self.engine)
        self.reference = (
            build_reference(start, self._build_policy, self.policy, self.backbone.unet) if start is not None else None
        )
        self.algorithm = build_algorithm(config.algorithm, config.update)
        self.pretraining = Pretraining(config, self.policy, self.backbone) if config.pretraining.weight > 0 else None
        self.evaluators = build_evaluators(config, self.tasks, self.encode, self.backbone.decode)
        self.grid_prompts = grid_prompts(config)
        if checkpoint:
            self.load_state_dict(load_checkpoint(checkpoint, self.engine))
        self.tracker = Tracker(self.run_dir, config, self.iteration)

    def run(self) -> None:
        """Trains to `num_iterations` and exports; Ctrl-C, SIGTERM or a file run_dir/stop save a checkpoint and stop."""
        config = self.config
        with Interruption(self.run_dir / "stop") as self.interruption:
            try:
                self.memory.verdict(self.tracker.say)
                for iteration in range(self.iteration, config.num_iterations):
                    self.unfinished = self.state_dict()
                    evaluated = self.evaluate(iteration)
                    self.memory.begin()
                    start, lr = time.perf_counter(), self.engine.lr
                    rounds = [self.train_round(iteration, number) for number in range(len(self.tasks.rounds))]
                    self.iteration, self.queries = iteration + 1, self.queries + self.num_samples
                    head = {"iteration": iteration, "queries": self.queries, "lr": lr}
                    stages = {**merged(rounds), **self.engine.metrics(), **self.memory.metrics()}
                    seconds = time.perf_counter() - start
                    speed = {"seconds/iteration": seconds, "images_per_second": self.num_samples / seconds}
                    self.tracker.log({**head, **stages, **speed, **evaluated})
                    self.memory.compare(self.tracker.say)
                    self.save_if_due()
                self.finish()
            except Interrupted:
                self.load_state_dict(self.unfinished)
                self.save()
                self.tracker.say(f"stopped after {self.iteration} iterations; go on with --resume latest")
            finally:
                self.tasks.rewards.shutdown()
                if self.pretraining:
                    self.pretraining.close()
                self.tracker.close()

    def train_round(self, iteration: int, number: int) -> dict[str, float]:
        """A rollout and the updates on it, for all tasks or, task by task, for the one whose turn it is."""
        turn = iteration * len(self.tasks.rounds) + number
        prompts = self.tasks.next_batch(self.tasks.rounds[number])  # list[Prompt], len B
        batch = self.rollout(prompts, turn)  # no grad
        advantages, weights = self.shared_advantages(batch, prompts)  # (B,), (B,)
        noise = self.check_ratio(batch) if turn == 0 else {}
        gradients = self.task_gradients(batch, prompts, weights, turn)
        updated = self.update(batch, weights, turn)
        stages = {**batch.metrics(self.tasks.are_several), **self.tasks.advantage_metrics(self.tasks.rounds[number])}
        return {**stages, **updated.metrics(advantages), **noise, **gradients, **_seconds(batch, updated)}

    def rollout(self, prompts: list[Prompt], turn: int) -> Rollout:
        """Samples, decodes and rewards this process's B prompts; turn: the number of the round in the run."""
        return rollout(
            self.policy,
            prompts,
            self.encode,
            self.backbone.decode,
            self.tasks.rewards,
            parallel.generator(self.config.seed, 1, parallel.rank(), turn),
            self.config.rollout,
            turn // len(self.tasks.rounds),
            self._check_of(turn),
        )

    def shared_advantages(self, batch: Rollout, prompts: list[Prompt]) -> tuple[Tensor, Tensor]:
        """This process's advantages (B,) and what the algorithm makes of them (B,), from what all have earned."""
        rewards = parallel.all_gather(batch.total)  # (A,)
        advantages = self.tasks.advantages(rewards, parallel.all_gather_list(prompts))  # (A,)
        first = parallel.rank() * len(prompts)
        own = slice(first, first + len(prompts))
        return advantages[own], self.algorithm.weights(advantages)[own].to(self.device)

    def update(self, batch: Rollout, weights: Tensor, turn: int) -> UpdateMetrics:
        """The optimizer steps on this rollout."""
        return update(
            self.policy,
            self.algorithm,
            batch.trajectory,
            weights,
            self.engine,
            self.config.update,
            parallel.generator(self.config.seed, 2, parallel.rank(), turn),
            self.reference,
            self.pretraining,
            before_first_step=self._check_of(turn),
        )

    def task_gradients(self, batch: Rollout, prompts: list[Prompt], weights: Tensor, turn: int) -> dict[str, float]:
        """How several tasks pull, where that is due, once all have had their turn; see task_gradients.py."""
        every, iteration = self.config.tracking.task_gradients_every, turn // len(self.tasks.rounds)
        engine = self.config.engine
        if not self.tasks.are_several or every == 0 or iteration % every:
            return {}
        if engine.zero_stage >= 2 or engine.optimizer_in_backward:  # which are there so that gradients never all exist
            return {}
        unet, names = self.backbone.unet, [prompt.task for prompt in prompts]
        generator = parallel.generator(self.config.seed, 4, parallel.rank(), turn)
        arguments = (self.algorithm, batch.trajectory, weights, names, self.config.update, generator)
        self.gradients |= gradients_by_task(self._build_policy(unet), unet, *arguments)
        if len(self.gradients) < len(self.tasks.trained):
            return {}
        gradients, self.gradients = self.gradients, {}
        return gradient_metrics(gradients)

    def check_ratio(self, batch: Rollout) -> dict[str, float]:
        """Before the first update every ratio should be 1; what is left is rounding, and no clip should act on it."""
        generator, config = parallel.generator(self.config.seed, 3, parallel.rank()), self.config.update
        noise = max(parallel.all_gather_list([ratio_noise(self.policy, batch.trajectory, config, generator)]))
        if noise >= config.clip_range and self.algorithm.clips and not config.is_on_policy:
            self.tracker.say(
                f"warning: rounding alone moves the ratio by {noise:.1e}, as much as update.clip_range="
                f"{config.clip_range}: clipping will act on noise; set update.old_log_probs=recompute or "
                "engine.dtype=fp32, or raise the clip range above the noise"
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
                for images, _ in drawn(self.policy, self.grid_prompts, *sample):  # one micro-batch: the main process's
                    self.tracker.grid(iteration, images, texts)
            evaluators = self.evaluators if is_scored else []
            return {key: value for one in evaluators for key, value in one(self.policy, iteration).items()}

    def finish(self) -> None:
        """The evaluation of the final weights, and a folder that stock diffusers loads."""
        evaluated = self.evaluate(self.iteration)
        if evaluated:
            self.tracker.log({"iteration": self.iteration, "queries": self.queries, **evaluated})
        # under ZeRO-3 all must gather; else a copy in the CPU's memory is enough
        weights = self.engine.final_weights() if parallel.is_main() or self.engine.zero_stage == 3 else {}
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
            "tasks": self.tasks.state_dict(),
            "pretraining": self.pretraining.state_dict() if self.pretraining else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken."""
        self.iteration, self.queries = state["iteration"], state["queries"]
        self.tasks.load_state_dict(state["tasks"])
        if self.pretraining and state["pretraining"]:
            self.pretraining.load_state_dict(state["pretraining"])

    def encode(self, prompts: Sequence[Prompt]) -> Conditioning:
        """The prompts' text encodings, each distinct text encoded once in the run."""
        return self.backbone.encode(prompts, with_negative=self.policy.needs_negative)

    def _build_policy(self, unet: Any) -> GaussianPolicy:
        config = self.config.policy
        backbone = self.backbone
        return build_policy(config, unet, backbone.unet.config, backbone.scheduler_config, backbone.dtype, self.device)

    @property
    def num_samples(self) -> int:
        """Of an iteration, over all processes."""
        return self.tasks.num_samples

    def _check_of(self, turn: int) -> Callable[[], None]:
        """What a round asks whether to stop: only the first of an iteration may, as weights have not moved yet."""
        return self.interruption.check if turn % len(self.tasks.rounds) == 0 else lambda: None

    def _due(self, every: int, iteration: int) -> bool:
        """Every so often and for the final weights; never where `every` is 0."""
        return every > 0 and (iteration % every == 0 or iteration == self.config.num_iterations)

    def _refuse_to_overwrite(self) -> None:
        if self.config.resume is None and (self.run_dir / "metrics.jsonl").exists():
            raise ValueError(
                f"run_dir={self.run_dir} already holds a run; go on with --resume latest, or give another --run_dir"
            )


def _seconds(batch: Rollout, updated: UpdateMetrics) -> dict[str, float]:
    return {
        "seconds/rollout": batch.seconds,
        "seconds/reward_wait": batch.wait_seconds,
        "seconds/update": updated.seconds,
        **({"seconds/pretraining": updated.pretraining_seconds} if updated.pretraining_loss is not None else {}),
    }
