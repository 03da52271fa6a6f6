"""Held-out images at fixed seeds, scored by the trained rewards and by rewards that the run does not optimise.

The same prompts and noise every time, so that a difference is the policy's. Micro-batch i has the noise of (seed, i)
and goes to rank i mod world size, so the numbers do not depend on how many processes share the work. Groups of set
rewards are made of all images together, and measured by their value, whatever the credit of their members.
"""

# B images of this process, N of all, F numbers that describe one

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.config import Config, EvaluationConfig
from rlcm_fast.config.tasks import tasks_of
from rlcm_fast.policies.base import GaussianPolicy
from rlcm_fast.prompts import deal, load_prompts
from rlcm_fast.rewards import Reward, RewardService, build_reward, evaluate
from rlcm_fast.rewards.diversity import Diversity, Thumbnails
from rlcm_fast.tasks import Tasks
from rlcm_fast.trajectory import Conditioning, Prompt

NamedRewards = Mapping[str, tuple[Reward, float]]  # name -> reward and its weight


@dataclass(frozen=True)
class Evaluator:
    """What is drawn (an image for each of `prompts`, noise from `seed`) and what scores it.

    rewards     those of each prefix of the metrics; several tasks may be evaluated on one draw
    """

    prompts: Sequence[Prompt]
    seed: int
    micro_batch_size: int
    rewards: Mapping[str, NamedRewards]
    encode: Callable[[Sequence[Prompt]], Conditioning]
    decode: Callable[[Tensor], Tensor]

    def __call__(self, policy: GaussianPolicy, iteration: int) -> dict[str, float]:
        """`<prefix>/<reward>/mean`, `<prefix>/<reward>/std` and `<prefix>/diversity`, the same on every rank."""
        answers_to, thumbnails = self._answers(policy, iteration)
        diversity = Diversity().value(self._everyones(thumbnails)[None]).item()
        metrics: dict[str, float] = {}
        for prefix, rewards in self.rewards.items():
            answers = answers_to[prefix]
            for name in sorted(rewards):
                reward, everyones = rewards[name][0], self._everyones(answers.get(name))  # (N,) or (N, F)
                values = evaluate(name, reward, everyones, self.prompts, iteration).double()
                metrics[f"{prefix}/{name}/mean"] = values.mean().item()
                metrics[f"{prefix}/{name}/std"] = values.std(correction=0).item()
            metrics[f"{prefix}/diversity"] = diversity
        return metrics

    def _answers(self, policy: GaussianPolicy, iteration: int) -> tuple[dict[str, dict[str, Tensor]], Tensor | None]:
        """What the rewards of each prefix say of this rank's images, a micro-batch at a time, and thumbnails of these.

        Groups may go across ranks, so none are made here. Nothing and None with fewer micro-batches than ranks.
        """
        services: dict[str, RewardService] = {}
        for prefix, rewards in self.rewards.items():
            first = next(iter(services.values()), None)
            services[prefix] = RewardService(rewards, num_workers=1, beside=first)
        thumbnails: list[Tensor] = []
        sample = (self.seed, self.micro_batch_size, self.encode, self.decode)
        try:
            for images, prompts in drawn(policy, self.prompts, *sample):
                thumbnails.append(Thumbnails()(images, prompts))
                for service in services.values():
                    service.submit(images, prompts)
            if not thumbnails:
                return {prefix: {} for prefix in services}, None
            return {prefix: one.answers(iteration) for prefix, one in services.items()}, torch.cat(thumbnails)
        finally:
            for service in services.values():
                service.shutdown()

    def _everyones(self, mine: Tensor | None) -> Tensor:
        """The rows of all ranks (N, ...), in the order of `prompts`; None where this rank has none."""
        gathered = torch.cat(parallel.all_gather_list([] if mine is None else [mine.cpu()]))
        dealt = torch.arange(len(self.prompts)).split(self.micro_batch_size)
        size = parallel.world_size()
        order = torch.cat([rows for rank in range(size) for rows in dealt[rank::size]])
        rows = torch.empty_like(gathered)
        rows[order] = gathered
        return rows


def build_evaluators(
    config: Config,
    tasks: Tasks,
    encode: Callable[[Sequence[Prompt]], Conditioning],
    decode: Callable[[Tensor], Tensor],
) -> list[Evaluator]:
    """One for each source of prompts, of the rewards of its tasks and those to watch that a task does not train.

    Several tasks have keys `eval/TASK/...`; those with one source share its images.
    """
    rewards: dict[str, dict[str, NamedRewards]] = {}  # source -> prefix -> rewards
    for task in tasks_of(config):
        prefix = f"eval/{task.name}" if config.tasks else "eval"
        rewards.setdefault(task.evaluation, {})[prefix] = {**tasks.watched, **tasks.trained[task.name]}
    return [
        build_evaluator(replace(config.evaluation, prompts=source), by_prefix, encode, decode)
        for source, by_prefix in rewards.items()
    ]


def build_evaluator(
    config: EvaluationConfig,
    rewards: Mapping[str, NamedRewards],
    encode: Callable[[Sequence[Prompt]], Conditioning],
    decode: Callable[[Tensor], Tensor],
) -> Evaluator:
    """rewards: by prefix; on ShapesWorld always of the detector, too: a reward alone proves nothing."""
    if config.prompts.startswith("shapes:"):
        detector: NamedRewards = {"shapes_alignment": (build_reward("shapes_alignment", {}), 1.0)}
        rewards = {prefix: {**detector, **own} for prefix, own in rewards.items()}
    prompts = deal(load_prompts(config.prompts, "evaluation.prompts"), config.num_images, config.seed)
    return Evaluator(prompts, config.seed, config.micro_batch_size, rewards, encode, decode)


def grid_prompts(config: Config) -> list[Prompt]:
    """Those of an image grid, from all over what the tasks are evaluated on."""
    sources = list(dict.fromkeys(task.evaluation for task in tasks_of(config)))
    share = max(1, config.tracking.grid_images // len(sources))
    found: list[Prompt] = []
    for source in sources:
        prompts = load_prompts(source, "evaluation.prompts")
        found += prompts[:: max(1, len(prompts) // share)][:share]
    return found[: config.tracking.grid_images]


def drawn(
    policy: GaussianPolicy,
    prompts: Sequence[Prompt],
    seed: int,
    micro_batch_size: int,
    encode: Callable[[Sequence[Prompt]], Conditioning],
    decode: Callable[[Tensor], Tensor],
) -> Iterator[tuple[Tensor, list[Prompt]]]:
    """This rank's share of the images (B, 3, H, W) and their prompts by micro-batches, noise fixed by `seed`.

    Under ZeRO-3 a forward pass needs all ranks: each takes part in every round, and keeps its own micro-batches only.
    """
    micro_batches = [list(prompts[i : i + micro_batch_size]) for i in range(0, len(prompts), micro_batch_size)]
    for first in range(0, len(micro_batches), parallel.world_size()):
        index = first + parallel.rank()
        is_mine = index < len(micro_batches)
        batch = micro_batches[index if is_mine else first]
        _, x_0 = policy.sample(encode(batch), parallel.generator(seed, index), explores=False)
        if is_mine:
            yield decode(x_0), batch
