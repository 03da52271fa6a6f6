"""Checks before any weights load whether a config can work; every message has the field, its value and the way out.

`validate` is the one place: first each number by itself (ranges.py), then what fields ask of each other, by subject.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from rlcm_fast.config import Config, PolicyConfig, PromptsConfig
from rlcm_fast.config.algorithm_checks import check_algorithm
from rlcm_fast.config.batches import with_numbers
from rlcm_fast.config.engine_checks import check_engine
from rlcm_fast.config.files import check_can_be_made, check_name, check_text
from rlcm_fast.config.guard_checks import check_guard
from rlcm_fast.config.image_sizes import check_image_sizes
from rlcm_fast.config.ranges import check_ranges
from rlcm_fast.config.resolved import ResolvedRun, resolve
from rlcm_fast.config.reward_checks import check_rewards
from rlcm_fast.config.size_checks import check_sizes
from rlcm_fast.config.task_checks import check_tasks

_ONE_STEP = (
    "policy.num_steps=1 leaves nothing to train: the last step is deterministic (sigma = 0), it makes the image and is "
    "no action, so its log-prob has no gradient; sample with 2 steps or more (the trained model still runs with 1), "
    "or set policy.last_step=sampled, which draws the image with a small noise (renoise, the paper's, is pure variance)"
)
_BESIDE_TASKS = (
    "has no use beside tasks, each of which has its own; move it into a task, or leave it out, or set tasks=[]"
)


def validate(config: Config, world_size: int) -> ResolvedRun:
    """Returns the resolved run, if the config can work on that many processes.

    Sizes of `auto` are checked, and count in the result, as what they are on a CPU; they divide evenly in any case.
    Raises ValueError "field=value ...; remedy" for the first value or combination that cannot.
    """
    check_ranges(config)
    _check_names(config, "")
    given, config = config, with_numbers(config, world_size)
    run = resolve(config, world_size)
    _check_use(config)
    check_image_sizes(config)
    _check_texts(config)
    _check_policy(run)
    check_tasks(run)
    check_rewards(run)
    check_algorithm(run)
    check_sizes(run)
    check_engine(run)
    check_guard(run)
    _check_lora(config)
    _check_resume(config)
    check_can_be_made(config.run_dir, "run_dir")
    return run if given is config else replace(run, config=given)


def _check_names(section: Any, prefix: str) -> None:
    """Refuses texts that no file, model or module can be called; a negative prompt may be as long as it likes."""
    for item in fields(section):
        name, value = prefix + item.name, getattr(section, item.name)
        if is_dataclass(value):
            _check_names(value, f"{name}.")
        for index, part in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(part):
                _check_names(part, f"{name}[{index}].")
        if isinstance(value, str):
            (check_text if name == "prompts.negative" else check_name)(name, value)


def _check_use(config: Config) -> None:
    """Refuses a field that has no effect because of another field.

    A default passes, though a user may have written it: a resolved config has all of them.
    """
    if config.profile > config.num_iterations:
        raise ValueError(
            f"profile={config.profile} is past num_iterations={config.num_iterations}; name one of them, 2 or a later "
            "one, as the first warms up"
        )
    if config.tasks:
        _check_beside_tasks(config)
    if not config.tasks and config.task_schedule == "by_task":
        raise ValueError("task_schedule=by_task has no tasks to take in turn; name tasks, or set task_schedule=mixed")
    if config.pretraining.weight == 0 and config.pretraining.data.strip():
        raise ValueError(
            f"pretraining.data={config.pretraining.data} has no use with pretraining.weight=0; give a weight, as 0.1, "
            "or set pretraining.data=''"
        )


def _check_beside_tasks(config: Config) -> None:
    """Refuses top-level fields that every task overrides."""
    default, tasks, rewards = Config(), config.tasks, config.rewards
    source, prompts, kind = config.prompts.source, config.evaluation.prompts, config.advantages.kind
    combine = config.rewards_combine
    has_prompts, has_kind = all(task.evaluation for task in tasks), all(task.advantages for task in tasks)
    idle = [
        ("prompts.source", source, source != default.prompts.source),
        ("rewards", f"[{', '.join(reward.name for reward in rewards)}]", rewards not in ([], default.rewards)),
        ("evaluation.prompts", prompts, has_prompts and prompts != default.evaluation.prompts),
        ("advantages.kind", kind, has_kind and kind != default.advantages.kind),
        ("rewards_combine", combine, all(task.rewards_combine for task in tasks) and combine != "sum"),
    ]
    for field, value, is_idle in idle:
        if is_idle:
            raise ValueError(f"{field}={value} {_BESIDE_TASKS}")


def _check_texts(config: Config) -> None:
    prompts, scale = config.prompts, config.policy.guidance_scale
    if prompts.negative and scale == 1:
        raise ValueError(
            f"prompts.negative={prompts.negative} has no use with policy.guidance_scale={scale:g}, which is no "
            "guidance; raise it, or set prompts.negative=''"
        )
    if prompts.long == "cut" and prompts.max_chunks != PromptsConfig().max_chunks:
        raise ValueError(
            f"prompts.max_chunks={prompts.max_chunks} has no use with prompts.long=cut; set prompts.long=chunks, or "
            "leave it out"
        )


def _check_policy(run: ResolvedRun) -> None:
    policy = run.config.policy
    _check_timesteps(policy)
    if policy.num_steps > 50 and policy.kind in ("consistency", "tcd") and not policy.timesteps:
        raise ValueError(f"policy.num_steps={policy.num_steps} exceeds the 50 steps of {policy.kind}; give fewer")
    if policy.last_step == "renoise" and policy.kind in ("euler_ancestral", "tcd"):
        raise ValueError(
            f"policy.last_step=renoise, but the last step of {policy.kind} has no noise to keep; use deterministic, or "
            "sampled to train it too"
        )
    if run.sizes.actions_per_sample == 0:
        raise ValueError(_ONE_STEP)


def _check_timesteps(policy: PolicyConfig) -> None:
    steps = policy.timesteps
    if not steps:
        return
    if len(steps) != policy.num_steps:
        raise ValueError(
            f"policy.num_steps={policy.num_steps}, but policy.timesteps={steps} names {len(steps)}; leave num_steps out"
        )
    if not all(0 <= step < 1000 for step in steps):
        raise ValueError(f"policy.timesteps={steps} must lie in [0, 999], the timesteps of training; give others")
    if any(later >= step for step, later in itertools.pairwise(steps)):
        falling = sorted(set(steps), reverse=True)
        raise ValueError(f"policy.timesteps={steps} must fall from step to step, noisiest first; give {falling}")


def _check_lora(config: Config) -> None:
    if not all(target.strip() for target in config.lora.targets) or not config.lora.targets:
        raise ValueError(f"lora.targets={config.lora.targets} names no layer; give names of layers, as [to_q, to_v]")


def _check_resume(config: Config) -> None:
    resume = config.resume
    if resume is not None and resume != "latest" and not Path(resume).is_dir():
        raise ValueError(f"resume={resume} is no folder; give 'latest' or a folder in {config.run_dir}/checkpoints")
    weights = config.resume_weights_only
    if weights is not None and resume is not None:
        raise ValueError(
            f"resume={resume} goes on with a run, and resume_weights_only={weights} starts a new one; leave out one of "
            "them (--resume_weights_only null)"
        )
    if weights is not None and not Path(weights).is_dir():
        raise ValueError(
            f"resume_weights_only={weights} is no folder; give a checkpoint, a run's folder or its checkpoints/"
        )
