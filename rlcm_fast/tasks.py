"""The tasks of a run. Each task has its prompts, rewards and advantages; a usual run has one task, called "default".

round           the tasks that share a rollout and its updates: all of them (mixed), or one after another (by_task, the
                schedule of large-scale RL for diffusion models, arXiv 2401.12244, algorithm 1)
next_batch      the prompts of a round; prompts of one task lie side by side
rewards         the rewards of its task score each image
advantages      each task standardises its rewards with its own statistics
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlcm_fast.algorithms import Combined, TaskAdvantages, Weighted, build_combined
from rlcm_fast.config import AdvantagesConfig, RewardConfig
from rlcm_fast.config.resolved import ResolvedRun, Task
from rlcm_fast.given import NOTHING, Given
from rlcm_fast.prompts import Sampler, Share, build_sampler
from rlcm_fast.rewards import GroupReward, Reward, RewardBuilder, RunPlace, Skipping, Trial, used
from rlcm_fast.rewards.task_rewards import TaskRewards
from rlcm_fast.trajectory import Prompt

_SEED_STEP = 1_000_003  # between the seeds of tasks, so that tasks with the same source draw different prompts


class Tasks:
    """The prompts, rewards and advantages of all tasks, on one process."""

    def __init__(self, run: ResolvedRun, rank: int = 0, given: Given = NOTHING) -> None:
        """Reads the prompts and builds the rewards; raises ValueError if one of them is wrong."""
        config = run.config
        self.rounds: list[list[str]] = [[task.name for task in tasks] for tasks in run.rounds]
        self.are_several = run.has_tasks
        self.num_samples = run.sizes.samples_per_iteration  # over all processes
        builder = RewardBuilder(given.rewards)  # tasks with the same reward share its model
        self.trained = {task.name: _built(task.rewards, builder, task.rewards_field) for task in run.tasks}
        for task in run.tasks:
            _check_credits(task, self.trained[task.name], run.sizes.num_processes)
        self.watched = _built(config.evaluation.rewards, builder, "evaluation.rewards")
        self.offloading = builder.offloading()
        self.skipping = {task.name: self._skipping(task.rewards, run) for task in run.tasks}
        self.rewards = TaskRewards(self.trained, config.rollout, self._name_of, self.skipping)
        self.rewards.begin(RunPlace(Path(config.run_dir), config.num_iterations))
        self._samplers: dict[str, Sampler] = {}
        self._upcoming: tuple[list[Prompt], dict[str, Any]] | None = None  # a batch in advance, the state before it
        for number, task in enumerate(run.tasks):
            share = self._share(task, config.seed + number * _SEED_STEP, rank, run.sizes.num_processes)
            self._samplers[task.name] = build_sampler(task.source, share, task.source_field, given.prompts)
        self._timeout = config.rollout.reward_timeout
        self._trials = self._all_trials(run)
        by_task = {task.name: _combined(task, config.advantages) for task in run.tasks}
        self.advantages: Combined | TaskAdvantages = TaskAdvantages(by_task) if self.are_several else by_task["default"]

    @property
    def reward_names(self) -> list[str]:
        """The names of all rewards, those of the evaluation last, each once."""
        return list(dict.fromkeys(name for rewards in (*self.trained.values(), self.watched) for name in rewards))

    @property
    def models_used(self) -> dict[str, Any]:
        """The models that rewards compute on, by reward, as JSON: names, revisions, sizes and hashes of files."""
        return used(
            {name: reward for rewards in (*self.trained.values(), self.watched) for name, reward in rewards.items()}
        )

    def next_batch(self, names: Sequence[str]) -> list[Prompt]:
        """Returns the prompts of a round that this process draws images for."""
        if self._upcoming is not None:
            (prompts, _), self._upcoming = self._upcoming, None
            return prompts
        return [prompt for name in names for prompt in self._samplers[name].next_batch()]

    def upcoming_batch(self, names: Sequence[str]) -> list[Prompt]:
        """Returns what the next call of `next_batch`, which is for the tasks `names`, will return."""
        if self._upcoming is None:
            before = self._prompts_state()
            self._upcoming = (self.next_batch(names), before)
        return self._upcoming[0]

    def texts(self, most: int) -> list[str]:
        """Returns prompts of all tasks that are at hand, at most `most` of each."""
        return [prompt.text for prompts in self.known(most).values() for prompt in prompts]

    def known(self, most: int) -> dict[str, list[Prompt]]:
        """Returns prompts of each task that are at hand, at most `most` of each."""
        return {name: list(sampler.known(most)) for name, sampler in self._samplers.items()}

    def try_rewards(self, size: tuple[int, int], device: torch.device, on_models: bool) -> None:
        """Calls each reward on two random images, those on models of the pack or all others; raises ValueError."""
        for trial in self._trials:
            if trial.is_on_models == on_models:
                trial.run(size, device, self._timeout)

    def metrics(self, names: Sequence[str]) -> dict[str, float]:
        """Returns what the last batch says of the advantages, and a person of the model.

        Keys are `advantage/...`, with several tasks `advantage/TASK/...`, and `rating/...`.
        """
        metrics: Any = self.advantages.metrics()
        by_task = {f"{name}/": metrics[name] for name in names} if self.are_several else {"": metrics}
        named = {}
        for prefix, of_task in by_task.items():
            named |= {f"advantage/{prefix}{key}": value for key, value in of_task.items()}
        return named | self.rewards.person_metrics()

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as JSON, the same on every rank."""
        prompts = self._prompts_state() if self._upcoming is None else self._upcoming[1]
        return {"prompts": prompts, "advantages": self.advantages.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the place where `state_dict` was taken; prompts without a state begin anew."""
        if state["prompts"].keys() != self._samplers.keys():
            saved = ", ".join(state["prompts"])
            raise ValueError(
                f"resume: the checkpoint is of tasks {saved}, and this run has {', '.join(self._samplers)}; keep the "
                "tasks, or start a new run with --resume_weights_only PATH"
            )
        for name, sampler in self._samplers.items():
            if state["prompts"][name] is not None:
                sampler.load_state_dict(state["prompts"][name])
        self.advantages.load_state_dict(state["advantages"])
        self._upcoming = None

    def _prompts_state(self) -> dict[str, Any]:
        return {name: sampler.state_dict() for name, sampler in self._samplers.items()}

    def _all_trials(self, run: ResolvedRun) -> list[Trial]:
        """Returns a trial of each reward, those of the evaluation with the prompts of the first task."""
        named = [(task.rewards_field, task.rewards, self.trained[task.name], task.name) for task in run.tasks]
        named.append(("evaluation.rewards", run.config.evaluation.rewards, self.watched, run.tasks[0].name))
        trials: dict[int, Trial] = {}  # tasks may share a reward
        for field, configs, built, task_name in named:
            prompts = self._samplers[task_name].known(2)
            for index, config in enumerate(configs):
                reward = built[config.key][0]
                trial = Trial(f"{field}[{index}].name", config.name, reward, prompts, config.on_failure == "skip")
                trials.setdefault(id(reward.reward if isinstance(reward, GroupReward) else reward), trial)
        return list(trials.values())

    def _skipping(self, rewards: Sequence[RewardConfig], run: ResolvedRun) -> Skipping:
        return Skipping(skipped_names(rewards), run.config.rollout.max_skipped, self.num_samples)

    def _share(self, task: Task, seed: int, rank: int, world_size: int) -> Share:
        num_prompts = round(task.num_prompts) // world_size
        label = task.name if self.are_several else ""
        return Share(num_prompts, task.images_per_prompt, seed, rank, world_size, label)

    def _name_of(self, prompt: Prompt) -> str:
        return prompt.task if self.are_several else "default"  # a .jsonl file may label its prompts


def skipped_names(rewards: Sequence[RewardConfig]) -> frozenset[str]:
    """Returns the names of the rewards that may fail for single images."""
    return frozenset(reward.key for reward in rewards if reward.on_failure == "skip")


def _combined(task: Task, config: AdvantagesConfig) -> Combined:
    rewards = [Weighted(reward.key, reward.weight, reward.threshold) for reward in task.rewards]
    return build_combined(task.advantages, task.rewards_combine, config, rewards)


def _built(configs: Sequence[RewardConfig], builder: RewardBuilder, field: str) -> dict[str, tuple[Reward, float]]:
    """Builds the rewards by name, each with its weight."""
    return {
        config.key: (builder.build(config, f"{field}[{index}]"), config.weight) for index, config in enumerate(configs)
    }


def _check_credits(task: Task, rewards: Mapping[str, tuple[Reward, float]], world_size: int) -> None:
    """Refuses a set reward that gives all compared images the same credit: no image would be better than another."""
    if task.advantages == "prompt":  # also compares with earlier batches
        return
    compared = task.num_samples if task.advantages == "batch" else task.images_per_prompt
    for index, (name, (reward, _)) in enumerate(rewards.items()):
        if not isinstance(reward, GroupReward) or not reward.gives_all_the_same:
            continue
        size = reward.group_size or task.num_samples // world_size
        if size % compared == 0:
            raise ValueError(
                f"{task.rewards_field}[{index}].credit=group of {name} in groups of {size} gives the same to all "
                f"{compared} images that {task.advantages_field}={task.advantages} compares; set credit=leave_one_out, "
                "or smaller groups"
            )
