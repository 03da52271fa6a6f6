"""Scores held-out images at fixed seeds, with the trained rewards and with rewards that the run does not optimise.

Prompts and noise are the same every time, so a difference comes from the policy. Micro-batch i has the noise of
(seed, i) and goes to rank i mod world size, so the numbers do not depend on how many processes share the work. Set
rewards make groups of all images together and report the value of each group, whatever its members are credited.
"""

# B images of this process, N of all, F numbers that describe one

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import EvaluationConfig
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.prompts import load_prompts, prompts_for_images
from rlcm_fast.rewards import Reward, RewardService, build_reward, evaluate
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.run_folder.tracking import Tracker
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.tasks import Tasks
from rlcm_fast.trajectory import Prompt

NamedRewards = Mapping[str, tuple[Reward, float]]  # name -> reward and its weight


@dataclass(frozen=True)
class HeldOut:
    """The images to draw: one for each of `prompts`, with noise from `seed`, `micro_batch_size` at a time."""

    prompts: list[Prompt]
    seed: int
    micro_batch_size: int

    def draw(self, images: TextToImage) -> Iterator[tuple[Tensor, list[Prompt]]]:
        """Yields this rank's share of the images (B, 3, H, W) and their prompts, one micro-batch at a time.

        Under ZeRO-3 a forward pass needs all ranks: each rank takes part in every round and keeps only its
        micro-batches.
        """
        size = self.micro_batch_size
        micro_batches = [list(self.prompts[i : i + size]) for i in range(0, len(self.prompts), size)]
        for first in range(0, len(micro_batches), parallel.world_size()):
            index = first + parallel.rank()
            is_mine = index < len(micro_batches)
            batch = micro_batches[index if is_mine else first]
            _, x_0 = images.sample(images.encode(batch), parallel.generator(self.seed, index))
            if is_mine:
                yield images.decode(x_0), batch


@dataclass(frozen=True)
class Evaluator:
    """Held-out images and the rewards that score them, by prefix of the metrics; several tasks may share the images."""

    held_out: HeldOut
    rewards: Mapping[str, NamedRewards]

    def __call__(self, images: TextToImage, iteration: int) -> dict[str, float]:
        """Returns `<prefix>/<reward>/mean`, `<prefix>/<reward>/std` and `<prefix>/diversity`, equal on every rank."""
        raw_scores, thumbnails = self._raw_scores(images, iteration)
        diversity = Diversity().value(self._gathered(thumbnails)[None]).item()
        metrics: dict[str, float] = {}
        for prefix, rewards in self.rewards.items():
            for name in sorted(rewards):
                reward, gathered = rewards[name][0], self._gathered(raw_scores[prefix].get(name))  # (N,) or (N, F)
                values = evaluate(name, reward, gathered, self.held_out.prompts, iteration).double()
                metrics[f"{prefix}/{name}/mean"] = values.mean().item()
                metrics[f"{prefix}/{name}/std"] = values.std(correction=0).item()
            metrics[f"{prefix}/diversity"] = diversity
        return metrics

    def _raw_scores(self, images: TextToImage, iteration: int) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
        """Returns the raw scores of this rank's images, by prefix and reward, and thumbnails of the images.

        It makes no groups, because groups may span ranks. A rank without a micro-batch returns nothing and None.
        """
        # Start the reward workers; prefixes share their threads.
        services: dict[str, RewardService] = {}
        for prefix, rewards in self.rewards.items():
            first = next(iter(services.values()), None)
            services[prefix] = RewardService(rewards, num_workers=1, beside=first)
        thumbnails: list[Tensor] = []

        # Draw one micro-batch at a time and hand it to every reward.
        try:
            for batch, prompts in self.held_out.draw(images):
                thumbnails.append(Thumbnails()(batch, prompts))
                for service in services.values():
                    service.submit(batch, prompts)
            if not thumbnails:
                return {prefix: {} for prefix in services}, None
            raw_scores = {prefix: service.raw_scores(iteration) for prefix, service in services.items()}
            return raw_scores, torch.cat(thumbnails)
        finally:
            for service in services.values():
                service.shutdown()

    def _gathered(self, of_rank: Tensor | None) -> Tensor:
        """Returns the rows of all ranks (N, ...), in the order of the prompts; None stands for no rows."""
        gathered = torch.cat(parallel.all_gather_list([] if of_rank is None else [of_rank.cpu()]))
        micro_batches = torch.arange(len(self.held_out.prompts)).split(self.held_out.micro_batch_size)
        size = parallel.world_size()
        order = torch.cat([rows for rank in range(size) for rows in micro_batches[rank::size]])
        rows = torch.empty_like(gathered)
        rows[order] = gathered
        return rows


@dataclass(frozen=True)
class Evaluation:
    """Everything that a run looks at; it uses the averaged weights if there is an average."""

    images: TextToImage
    engine: AveragingEngine
    evaluators: Sequence[Evaluator]
    grid: HeldOut

    def __call__(self, iteration: int, tracker: Tracker, is_scored: bool, is_drawn: bool) -> dict[str, float]:
        """Scores held-out images and draws the grid, with the weights after `iteration` iterations."""
        if not (is_scored or is_drawn):
            return {}
        metrics: dict[str, float] = {}
        with self.engine.averaged():
            if is_drawn:
                for pictures, prompts in self.grid.draw(self.images):  # one micro-batch, on the main process
                    tracker.grid(iteration, pictures, [prompt.text for prompt in prompts])
            for evaluator in self.evaluators if is_scored else ():
                metrics |= evaluator(self.images, iteration)
        return metrics


def build_evaluation(run: ResolvedRun, tasks: Tasks, images: TextToImage, engine: AveragingEngine) -> Evaluation:
    """Builds an evaluator for each source of prompts, with the rewards of its tasks and the rewards to watch.

    With several tasks the keys are `eval/TASK/...`; tasks with the same source share its images.
    """
    rewards: dict[str, dict[str, NamedRewards]] = {}  # source -> prefix -> rewards
    for task in run.tasks:
        prefix = f"eval/{task.name}" if run.has_tasks else "eval"
        rewards.setdefault(task.evaluation, {})[prefix] = {**tasks.watched, **tasks.trained[task.name]}
    config = run.config.evaluation
    evaluators = [build_evaluator(replace(config, prompts=source), by_prefix) for source, by_prefix in rewards.items()]
    prompts = grid_prompts(list(rewards), run.config.tracking.grid_images)
    return Evaluation(images, engine, evaluators, HeldOut(prompts, config.seed, len(prompts)))


def build_evaluator(config: EvaluationConfig, rewards: Mapping[str, NamedRewards]) -> Evaluator:
    """Builds an evaluator with rewards by prefix; on ShapesWorld it adds the detector, which no reward replaces."""
    if config.prompts.startswith("shapes:"):
        detector: NamedRewards = {"shapes_alignment": (build_reward("shapes_alignment", {}), 1.0)}
        rewards = {prefix: {**detector, **own} for prefix, own in rewards.items()}
    prompts = prompts_for_images(load_prompts(config.prompts, "evaluation.prompts"), config.num_images, config.seed)
    return Evaluator(HeldOut(prompts, config.seed, config.micro_batch_size), rewards)


def grid_prompts(sources: Sequence[str], num_images: int) -> list[Prompt]:
    """Returns the prompts of an image grid, spread over all prompts that the tasks are evaluated on."""
    share = max(1, num_images // len(sources))
    found: list[Prompt] = []
    for source in sources:
        prompts = load_prompts(source, "evaluation.prompts")
        found += prompts[:: max(1, len(prompts) // share)][:share]
    return found[:num_images]
