"""Scores held-out images at fixed seeds, with the trained rewards and with rewards that the run does not optimise.

Prompts and noise are the same every time, so a difference comes from the policy. Micro-batch i has the noise of
(seed, i) and goes to rank i mod world size, so the numbers do not depend on how many processes share the work. With
several image sizes, prompt i is drawn at size i mod their number, and each size is also reported by itself. Set
rewards make groups of all images together and report the value of each group, whatever its members are credited.

A reward that fails on one process ends the evaluation on all of them, once all have drawn their images. Images that a
reward may skip and has no score for do not count in its mean.
"""

# B images of this process, N of all, F numbers that describe one

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import RolloutConfig
from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.rewards import (
    DecodedImages,
    GroupReward,
    Offloading,
    Reward,
    RewardService,
    Skipping,
    Workers,
    evaluate,
    joined,
)
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.run_folder.guard_pictures import first_pictures
from rlcm_fast.run_folder.interruption import StoppedByGuard
from rlcm_fast.run_folder.stage_profile import stage
from rlcm_fast.run_folder.tracking import Tracker, say
from rlcm_fast.stages.album import Album, Picture
from rlcm_fast.stages.guard import Describe, Guard
from rlcm_fast.stages.guard_measures import Seen
from rlcm_fast.stages.held_out import HeldOut
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.stages.rollout import mean_and_std

NamedRewards = Mapping[str, tuple[Reward, float]]  # name -> reward and its weight


@dataclass(frozen=True)
class _Scored:
    """What a rank knows of its images; nothing and None if it has none."""

    raw_scores: Mapping[str, Mapping[str, Tensor]]  # by prefix and reward: (B,) or (B, F), NaN where one is missing
    thumbnails: Tensor | None  # (B, F)
    described: Tensor | None  # (B, 5 + F), for the guard
    problems: tuple[str, ...] = ()  # what failed and was skipped, a line per reward and image
    first: tuple[tuple[int, Tensor], ...] = ()  # those of the first few prompts, for the guard
    kept: tuple[Picture, ...] = ()  # those of its images that the run folder keeps


@dataclass(frozen=True)
class Evaluator:
    """Held-out images and the rewards that score them, by prefix of the metrics; several tasks may share the images."""

    held_out: HeldOut
    rewards: Mapping[str, NamedRewards]
    config: RolloutConfig = field(default_factory=RolloutConfig)  # how long rewards may take, and how often fail
    skipped: Mapping[str, frozenset[str]] = field(default_factory=dict)  # the rewards that may fail, by prefix
    offloading: Offloading = field(default_factory=Offloading)  # models of rewards that are away between evaluations

    def __call__(self, images: TextToImage, iteration: int, album: Album | None = None) -> dict[str, float]:
        """Returns `<prefix>/<reward>/mean`, `<prefix>/<reward>/std` and `<prefix>/diversity`, equal on every rank.

        With several sizes, a reward of single images also has `<prefix>/<reward>/HEIGHTxWIDTH/mean` and `std`. A reward
        that may fail also has `<prefix>/<reward>/skipped`. The album gets the images and the scores of each. Raises a
        Fault, on all ranks together, if a reward fails and may not.
        """
        return self.looked(images, iteration, None, album)[0]

    def looked(
        self, images: TextToImage, iteration: int, describe: Describe | None, album: Album | None = None
    ) -> tuple[dict[str, float], Seen | None]:
        """Returns the metrics, and with `describe` what a guard sees in the same images; equal on every rank."""
        # Draw and score this rank's images, and join them with those of the others: groups may span ranks.
        with self.offloading.in_use(), images.decoding():
            scored = parallel.together(lambda: self._score(images, iteration, describe, album))
        diversity = Diversity().value(self._gathered(scored.thumbnails)[None]).item()
        raw_scores = {
            prefix: {name: self._gathered(scored.raw_scores[prefix].get(name)) for name in sorted(rewards)}
            for prefix, rewards in self.rewards.items()
        }
        problems = parallel.all_gather_list(list(scored.problems)) if any(self.skipped.values()) else []

        # Measure them; every rank sees the same.
        prompts = self.held_out.prompts
        if problems:
            say(f"evaluation of iteration {iteration} skipped images: {problems[-1]}")
        if album:
            album.add(prompts, parallel.all_gather_list(list(scored.kept)), self._single(raw_scores))
        metrics: dict[str, float] = {}
        for prefix, by_name in raw_scores.items():
            for name, gathered in by_name.items():  # (N,) or (N, F)
                if name in self.skipped.get(prefix, ()):
                    metrics[f"{prefix}/{name}/skipped"] = self._num_skipped(gathered, iteration, problems)
                values = parallel.together(partial(self._values, prefix, name, gathered, iteration))
                metrics |= mean_and_std(f"{prefix}/{name}", values)
                if not isinstance(self.rewards[prefix][name][0], GroupReward):
                    metrics |= self._by_size(f"{prefix}/{name}", values)
            metrics[f"{prefix}/diversity"] = diversity
        if describe is None:
            return metrics, None
        pictures = dict(parallel.all_gather_list(list(scored.first)))
        in_order = [pictures[row].float() / 255 for row in sorted(pictures)]
        return metrics, Seen.of(self._gathered(scored.described), prompts, in_order)

    def _single(self, raw_scores: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Returns the scores (N,) of rewards that score single images, by the key of their metric."""
        found = {}
        for prefix, by_name in raw_scores.items():
            for name, scores in by_name.items():
                if not isinstance(self.rewards[prefix][name][0], GroupReward):
                    found[f"{prefix}/{name}"] = scores
        return found

    def _by_size(self, key: str, values: Tensor) -> dict[str, float]:
        """Returns mean and deviation of values (N,) for each of several sizes."""
        sizes = self.held_out.sizes
        metrics: dict[str, float] = {}
        for index, (height, width) in enumerate(sizes if len(sizes) > 1 else ()):
            metrics |= mean_and_std(f"{key}/{height}x{width}", values[index :: len(sizes)])
        return metrics

    def _values(self, prefix: str, name: str, gathered: Tensor, iteration: int) -> Tensor:
        return evaluate(name, self.rewards[prefix][name][0], gathered, self.held_out.prompts, iteration)

    def _score(self, images: TextToImage, iteration: int, describe: Describe | None, album: Album | None) -> _Scored:
        """Draws this rank's images and scores them; it makes no groups, because groups may span ranks."""
        # Start the reward workers; prefixes share their threads.
        workers = Workers(1, self.config.reward_timeout)
        decoded = DecodedImages(workers, self.config.decoded_batches)
        services = {prefix: self._service(prefix, workers) for prefix in self.rewards}
        thumbnails: list[Tensor] = []
        described: list[Tensor] = []
        first: list[tuple[int, Tensor]] = []
        kept: list[Picture] = []

        # Draw one micro-batch at a time and hand it to every reward.
        try:
            # strict: after its last micro-batch this rank still takes part in the rounds of the others
            for run, (batch, prompts) in zip(self.held_out.of_rank, self.held_out.draw(images), strict=True):
                thumbnails.append(Thumbnails()(batch, prompts))
                if describe is not None:
                    described.append(describe(batch, prompts))
                    first += first_pictures(run.rows, batch)
                calls = [service.submit(batch, prompts) for service in services.values()]
                decoded.add(list(chain.from_iterable(calls)))
                decoded.wait_for_room()
                if album:
                    kept += album.pictures(run.rows, batch, len(self.held_out.prompts))
            if not thumbnails:  # this rank has no micro-batch
                return _Scored({prefix: {} for prefix in services}, None, None)
            found = {prefix: service.raw_scores(iteration) for prefix, service in services.items()}
            by_prefix = {prefix: raw_scores.by_name for prefix, raw_scores in found.items()}
            problems = chain.from_iterable(raw_scores.problems for raw_scores in found.values())
            rows = torch.cat(described) if described else None
            return _Scored(by_prefix, torch.cat(thumbnails), rows, tuple(problems), tuple(first), tuple(kept))
        finally:
            workers.shutdown()

    def _service(self, prefix: str, workers: Workers) -> RewardService:
        names, num_images = self.skipped.get(prefix, frozenset()), len(self.held_out.prompts)
        return RewardService(self.rewards[prefix], workers, Skipping(names, self.config.max_skipped, num_images))

    def _num_skipped(self, raw_scores: Tensor, iteration: int, problems: Sequence[str]) -> float:
        """Counts missing rows of raw_scores (N,) or (N, F) of all ranks; raises a Fault if they are too many."""
        num_images = len(raw_scores)
        num_skipped = int(raw_scores.reshape(num_images, -1).isnan().any(dim=1).sum())
        place = f"evaluation of iteration {iteration}"
        Skipping(share=self.config.max_skipped).check(num_skipped, num_images, place, problems)
        return float(num_skipped)

    def _gathered(self, of_rank: Tensor | None) -> Tensor:
        """Returns the rows of all ranks (N, ...), in the order of the prompts; None stands for no rows."""
        gathered = joined(parallel.all_gather_list([] if of_rank is None else [of_rank.cpu()]))
        micro_batches = [run.rows for run in self.held_out.micro_batches]
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
    num_kept: int = 0  # images of each evaluator that the run folder keeps
    guard: Guard | None = None  # compares the evaluators' images with the start model's
    guarding: Sequence[Evaluator] = ()  # the evaluators with what the guard needs alone

    @property
    def texts(self) -> list[str]:
        """The prompts of all images that are drawn here."""
        held_out = [self.grid, *(evaluator.held_out for evaluator in self.evaluators)]
        return [prompt.text for images in held_out for prompt in images.prompts]

    def __call__(self, iteration: int, tracker: Tracker, is_scored: bool, is_drawn: bool) -> dict[str, float]:
        """Scores held-out images and draws the grid, with the weights after `iteration` iterations.

        Raises StoppedByGuard, on all ranks, if the guard ends the run.
        """
        is_guarded = self.guard is not None and self.guard.is_due(iteration, is_scored)
        metrics: dict[str, float] = {}
        if not (is_scored or is_drawn or is_guarded):
            return metrics
        seen: list[Seen] = []
        with stage("evaluation"), self.engine.averaged():
            # Draw the grid, then score and describe the held-out images.
            if is_drawn:
                pictures, prompts = self.grid.draw_all(self.images)
                tracker.grid(iteration, pictures, [prompt.text for prompt in prompts])
            album = Album(self.num_kept) if self.num_kept and is_scored else None
            evaluators = self.evaluators if is_scored else self.guarding if is_guarded else ()
            for evaluator in evaluators:
                if self.guard is None or not is_guarded:
                    metrics |= evaluator(self.images, iteration, album)
                    continue
                found, seen_here = evaluator.looked(self.images, iteration, self.guard.describe, album)
                metrics |= found
                seen += [] if seen_here is None else [seen_here]
        if album and album.scores:
            tracker.evaluation(iteration, album.scores, album.files)
        return metrics | self._guarded(seen, metrics, iteration, tracker)

    def end_at(self, iteration: int) -> None:
        """Makes the weights after `iteration` iterations the final ones, which no guard stops."""
        if self.guard is not None:
            self.guard.num_iterations = iteration

    def _guarded(
        self, seen: Sequence[Seen], metrics: dict[str, float], iteration: int, tracker: Tracker
    ) -> dict[str, float]:
        """Returns the guard's metrics, if it has seen images; raises StoppedByGuard if it ends the run."""
        if self.guard is None or not seen:
            return {}
        guarded = self.guard(Seen.joined(seen), metrics, iteration, tracker.say)
        if self.guard.outside:
            tracker.guard(iteration, self.guard.pictures.file(iteration))
        if self.guard.stops(iteration):
            tracker.log({"iteration": iteration, **metrics, **guarded, "guard/stopped": 1.0})
            raise StoppedByGuard
        return guarded
