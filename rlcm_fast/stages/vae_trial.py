"""Tries the VAE's decoder in float16 at the start of a run (model.vae_dtype: auto), and asks the run's rewards as well.

    latents of each task's prompts, drawn with the start weights -> decoded in float32 and in float16
    -> float16 if pixels change by less than half a grey level on average, and the scores of each reward by at most 5 %

    change of a reward = mean |score in float16 - score in float32| / standard deviation of the scores in float32

Advantages are scores in units of their spread, so the change is the noise that float16 adds to them. At 5 % its
variance is 0.4 % of that of the scores (of a normal distribution): what an iteration learns is as noisy as with 0.4 %
fewer images. The spread of 16 images is known within a fifth.

Scores that are all equal have no spread: any change of them is too large, and no change says nothing against float16.
A set reward values groups of two. A reward that asks people or a server is not asked, because that may cost money, and
one that fails is left out; the line that says what was chosen names both.

A resumed run begins with the same weights, prompts and random numbers, so it finds the same; the checkpoint keeps the
choice all the same, because another GPU may round differently. All processes try the same, and the worst decides.
"""

# B images of a task

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.backbones.image_coder import BothPrecisions, Verdict
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, ModelConfig
from rlcm_fast.rewards import GroupReward, Reward, RewardError, RewardService, Skipping, Workers, asks_others
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.tasks import Tasks
from rlcm_fast.trajectory import Prompt

NUM_TRIED = 16  # images of each task
MOST_CHANGE = 0.05  # of the spread of a reward's scores


@dataclass(frozen=True)
class TriedTask:
    """A task's prompts, one for each image of the trial, and the rewards that score these."""

    prompts: Sequence[Prompt]
    rewards: Mapping[str, Reward]  # by the name that the line has
    may_fail: frozenset[str]  # names of rewards that may fail for single images


def choose_decoder(images: TextToImage, tasks: Tasks, others: Sequence[Prompt], config: Config) -> None:
    """Chooses the decoder's precision if it is open; every rank must call this, before anything else is decoded.

    others: prompts for a task of which none are at hand; its rewards are not asked.
    """
    if not images.backbone.decoder_is_open:
        return

    # Draw latents, in micro-batches of the rollout's size.
    tried, left_out = _tried(tasks, others)
    prompts = [prompt for task in tried for prompt in task.prompts]
    size = min(config.rollout.micro_batch_size, tasks.num_samples // parallel.world_size())
    num_drawn = -(-len(prompts) // size) * size
    drawn = [prompts[index % len(prompts)] for index in range(num_drawn)]
    latents = []
    for number, first in enumerate(range(0, num_drawn, size)):
        generator = parallel.generator(config.evaluation.seed, number)
        latents.append(images.sample(images.encode(drawn[first : first + size]), generator)[1])

    # Decode them in both precisions and let pixels and rewards judge.
    with tasks.offloading.in_use():
        judge = RewardJudge(tried, left_out, config.rollout.reward_timeout, size)
        images.backbone.choose_decoder(torch.cat(latents)[: len(prompts)].split(size), judge)


def kept_decoder(model: ModelConfig, backbone: Backbone) -> str | None:
    """Returns the precision that a checkpoint keeps; None if the config names it."""
    return backbone.decoder_precision if model.vae_dtype == "auto" else None


def restore_decoder(kept: str | None, model: ModelConfig, backbone: Backbone) -> None:
    """Decodes in the precision that a checkpoint kept, and says so if the trial has chosen another one."""
    chosen = kept_decoder(model, backbone)
    if None in (kept, chosen) or kept == chosen:
        return
    if backbone.device.type == "cpu":
        say(f"model.vae_dtype=auto: the VAE decodes in {chosen} on a CPU; until the checkpoint it was {kept}")
        return
    backbone.set_decoder(in_half=kept == "float16")
    say(f"model.vae_dtype=auto: the VAE decodes in {kept}, as until the checkpoint; the trial chose {chosen}")


def _tried(tasks: Tasks, others: Sequence[Prompt]) -> tuple[list[TriedTask], list[str]]:
    """Returns what is tried, and the names of the rewards that are not asked."""
    tried, left_out = [], list[str]()
    for task, known in tasks.known(NUM_TRIED).items():
        prompts = known or list(others)
        rewards, may_fail = dict[str, Reward](), set[str]()
        for name, (reward, _) in tasks.trained[task].items():
            label = f"{task}/{name}" if tasks.are_several else name
            if asks_others(reward) or not known:
                left_out.append(label)
                continue
            rewards[label] = replace(reward, group_size=2) if isinstance(reward, GroupReward) else reward
            may_fail |= {label} if name in tasks.skipping[task].names else set()
        repeated = [prompts[index % len(prompts)] for index in range(NUM_TRIED)]
        tried.append(TriedTask(repeated, rewards, frozenset(may_fail)))
    return tried, left_out


@dataclass(frozen=True)
class RewardJudge:
    """Judges float16 by pixels and by rewards; every rank must call it, with as many images."""

    tried: Sequence[TriedTask]  # in the order of the images
    left_out: Sequence[str]  # names of rewards that are not asked
    timeout: float  # seconds for an answer of a reward
    micro_batch_size: int

    def __call__(self, both: BothPrecisions) -> Verdict:
        """Says whether float16 is kept; rewards are asked only if pixels are close on all processes."""
        pixels = max(parallel.all_gather_list([_infinite_if_nan(both.change)]))
        if parallel.any_rank(not both.is_close):
            return Verdict(False, f"because float16 would change pixels by {pixels:.1e}")

        # Take the largest change of each reward; one that failed on a process is left out.
        of_ranks = parallel.all_gather_list([self._changes(both)])
        names = [name for name in of_ranks[0] if all(changes[name] is not None for changes in of_ranks)]
        found = {name: max(changes[name] or 0.0 for changes in of_ranks) for name in names}
        left_out = [*self.left_out, *(name for name in of_ranks[0] if name not in found)]
        without = f"; without {', '.join(left_out)}" if left_out else ""
        if not found:
            return Verdict(True, f"which changes pixels by {pixels:.1e}{without}")
        worst = max(found, key=lambda name: found[name])
        by = f"by {100 * found[worst]:.2g} % of its spread"
        if found[worst] > MOST_CHANGE:
            return Verdict(False, f"because float16 would change {worst} {by}, over {100 * MOST_CHANGE:g} %{without}")
        return Verdict(True, f"which changes pixels by {pixels:.1e} and rewards at most {by} ({worst}){without}")

    def _changes(self, both: BothPrecisions) -> dict[str, float | None]:
        """Returns the change of each reward's scores, by name; None if the reward failed."""
        found: dict[str, float | None] = {}
        first = 0
        for task in self.tried:
            rows = slice(first, first + len(task.prompts))
            for name in task.rewards:
                single, half = (self._scores(task, name, images[rows]) for images in (both.single, both.half))
                found[name] = None if single is None or half is None else relative_change(single, half)
            first = rows.stop
        return found

    def _scores(self, task: TriedTask, name: str, images: Tensor) -> Tensor | None:
        """Returns the scores (B,), NaN where one is missing; None if the reward failed."""
        workers = Workers(1, self.timeout)
        may_fail = Skipping(task.may_fail & {name}, 1.0, len(images))
        service = RewardService({name: (task.rewards[name], 1.0)}, workers, may_fail)
        try:
            for first in range(0, len(images), self.micro_batch_size):
                rows = slice(first, first + self.micro_batch_size)
                service.submit(images[rows], task.prompts[rows])
            return service.gather(iteration=0).values[name]
        except RewardError:
            return None
        finally:
            workers.shutdown()


def relative_change(single: Tensor, half: Tensor) -> float | None:
    """Returns the mean change of scores (B,) in units of their spread; None if fewer than two are there in both."""
    is_there = single.isfinite() & half.isfinite()
    if is_there.sum() < 2:
        return None
    change = (half - single)[is_there].double().abs().mean().item()
    spread = single[is_there].double().std().item()
    if change == 0:
        return 0.0
    return change / spread if spread > 0 else math.inf


def _infinite_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value
