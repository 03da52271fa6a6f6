"""What one field of the config cannot know alone: checked before any weights load, with the way out in the message."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rlcm_fast.config import Config, RewardConfig
from rlcm_fast.config_engine import check_engine

_ONE_STEP = (
    "policy.num_steps=1 leaves nothing to train: the last step is deterministic (sigma = 0), it makes the image and is "
    "no action, so its log-prob has no gradient; sample with 2 steps or more (the trained model still runs with 1), "
    "or set policy.last_step=renoise for the paper's letter, whose last action is pure variance"
)


class _Bound(NamedTuple):
    field: str
    value: float
    allowed: bool
    remedy: str


def validate(config: Config, world_size: int) -> None:
    """Raise ValueError "field=value ...; remedy" for the first value or combination that cannot work."""
    for field, value, allowed, remedy in _bounds(config):
        if not (allowed and math.isfinite(value)):
            raise ValueError(f"{field}={value} is out of range; give {remedy}")
    _check_policy(config)
    _check_rewards(config)
    _check_advantages(config)
    _check_sizes(config, world_size)
    _check_groups(config, world_size)
    _check_pretraining(config, world_size)
    check_engine(config, derived(config, world_size))
    _check_lora(config)
    _check_resume(config)


def derived(config: Config, world_size: int) -> dict[str, int]:
    """The numbers that follow from the config; counts are over all processes unless the name says otherwise."""
    samples = config.prompts.num_prompts * config.prompts.images_per_prompt
    transitions = samples * num_actions(config)
    transitions_per_update = transitions // config.update.num_updates
    updates = config.update.num_passes * config.update.num_updates
    return {
        "num_processes": world_size,
        "samples_per_iteration": samples,
        "samples_per_process": samples // world_size,
        "actions_per_sample": num_actions(config),
        "transitions_per_iteration": transitions,
        "transitions_per_update": transitions_per_update,
        "micro_batches_per_update_and_process": transitions_per_update // world_size // config.update.micro_batch_size,
        "updates_per_iteration": updates,
        "total_updates": updates * config.num_iterations,
        "total_queries": samples * config.num_iterations,
    }


def num_actions(config: Config) -> int:
    """K, the trained steps of a sample."""
    return config.policy.num_steps - (config.policy.last_step == "deterministic")


def _bounds(config: Config) -> Iterator[_Bound]:
    """Every field that has a range of its own."""
    yield from _counts(config)
    policy, update, optimizer = config.policy, config.update, config.optimizer
    scale = policy.guidance_scale
    yield _Bound("policy.guidance_scale", scale, scale >= 1, "1 (no guidance) or more")
    yield _Bound("policy.eta", policy.eta, 0 < policy.eta <= 1, "a number in (0, 1]: without noise there is no action")
    yield _Bound("lora.alpha", config.lora.alpha, config.lora.alpha > 0, "a positive number, as 16")
    yield _Bound("update.clip_range", update.clip_range, 0 < update.clip_range < 1, "a number in (0, 1), as 1e-4")
    yield _Bound("update.advantage_clip", update.advantage_clip, update.advantage_clip > 0, "a positive number, as 10")
    yield _Bound("update.max_grad_norm", update.max_grad_norm, update.max_grad_norm >= 0, "0 (off) or more")
    yield _Bound("update.kl_weight", update.kl_weight, update.kl_weight >= 0, "0 (off) or more")
    beta, dropout = config.pretraining.weight, config.pretraining.caption_dropout
    yield _Bound("pretraining.weight", beta, beta >= 0, "0 (off) or more")
    yield _Bound("pretraining.caption_dropout", dropout, 0 <= dropout <= 1, "a share in [0, 1], as 0.1")
    yield _Bound("ema.decay", config.ema.decay, 0 <= config.ema.decay < 1, "a number in [0, 1), as 0.99; 0 is off")
    yield _Bound("optimizer.lr", optimizer.lr, optimizer.lr > 0, "a positive number, as 1e-4")
    yield _Bound("optimizer.eps", optimizer.eps, optimizer.eps > 0, "a positive number, as 1e-8")
    yield _Bound("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0, "0 (off) or more")
    fraction = optimizer.final_lr_fraction
    yield _Bound("optimizer.final_lr_fraction", fraction, 0 <= fraction <= 1, "a number in [0, 1]; 1 is constant")
    for index, beta in enumerate(optimizer.betas):
        yield _Bound(f"optimizer.betas[{index}]", beta, 0 <= beta < 1, "a number in [0, 1)")


def _counts(config: Config) -> Iterator[_Bound]:
    at_least_one = {
        "num_iterations": config.num_iterations,
        "policy.num_steps": config.policy.num_steps,
        "prompts.num_prompts": config.prompts.num_prompts,
        "prompts.images_per_prompt": config.prompts.images_per_prompt,
        "rollout.micro_batch_size": config.rollout.micro_batch_size,
        "rollout.reward_workers": config.rollout.reward_workers,
        "advantages.buffer_size": config.advantages.buffer_size,
        "update.num_passes": config.update.num_passes,
        "update.num_updates": config.update.num_updates,
        "update.micro_batch_size": config.update.micro_batch_size,
        "pretraining.batch_size": config.pretraining.batch_size,
        "pretraining.micro_batch_size": config.pretraining.micro_batch_size,
        "evaluation.num_images": config.evaluation.num_images,
        "evaluation.micro_batch_size": config.evaluation.micro_batch_size,
        "checkpoint.keep": config.checkpoint.keep,
        "tracking.grid_images": config.tracking.grid_images,
    }
    at_least_zero = {
        "seed": config.seed,
        "model.image_size": config.model.image_size,
        "lora.rank": config.lora.rank,
        "rollout.decode_batch_size": config.rollout.decode_batch_size,
        "pretraining.workers": config.pretraining.workers,
        "evaluation.seed": config.evaluation.seed,
        "evaluation.every": config.evaluation.every,
        "checkpoint.every": config.checkpoint.every,
        "tracking.grid_every": config.tracking.grid_every,
        "optimizer.warmup_updates": config.optimizer.warmup_updates,
    }
    for field, value in at_least_one.items():
        yield _Bound(field, value, value >= 1, "1 or more")
    for field, value in at_least_zero.items():
        yield _Bound(field, value, value >= 0, "0 or more")


def _check_policy(config: Config) -> None:
    policy = config.policy
    most = 50 if policy.kind == "consistency" else 1000
    if policy.num_steps > most:
        raise ValueError(f"policy.num_steps={policy.num_steps} exceeds the {most} steps of {policy.kind}; give fewer")
    if num_actions(config) == 0:
        raise ValueError(_ONE_STEP)


def _check_rewards(config: Config) -> None:
    if not config.rewards:
        raise ValueError("rewards=[] leaves nothing to optimise; name one, as {name: jpeg_compressibility}")
    for index, reward in enumerate(config.rewards):
        if not math.isfinite(reward.weight) or reward.weight == 0:
            remedy = "give another, or move the reward to evaluation.rewards to only measure it"
            raise ValueError(f"rewards[{index}].weight={reward.weight} of {reward.name} has no use; {remedy}")
    _check_names("rewards", config.rewards, {})
    taken = {reward.name: "rewards, and what is trained is always evaluated" for reward in config.rewards}
    _check_names("evaluation.rewards", config.evaluation.rewards, taken)


def _check_names(field: str, rewards: list[RewardConfig], taken: dict[str, str]) -> None:
    taken = dict(taken)
    for index, reward in enumerate(rewards):
        if not reward.name.strip():
            raise ValueError(f"{field}[{index}].name='{reward.name}' is empty; name a reward or package.module:Class")
        if reward.name in taken:
            raise ValueError(f"{field}[{index}].name={reward.name} is already in {taken[reward.name]}; drop one")
        taken[reward.name] = field


def _check_advantages(config: Config) -> None:
    advantages, images = config.advantages, config.prompts.images_per_prompt
    if advantages.kind == "group" and images < 2:
        raise ValueError(f"prompts.images_per_prompt={images} makes no group for advantages.kind=group; give 2 or more")
    if advantages.kind == "prompt" and not 2 <= advantages.min_count <= advantages.buffer_size:
        remedy = f"give 2 to {advantages.buffer_size}, or a larger advantages.buffer_size"
        raise ValueError(
            f"advantages.min_count={advantages.min_count} must lie between 2 and "
            f"advantages.buffer_size={advantages.buffer_size}; {remedy}"
        )
    if config.prompts.num_prompts * images < 2:
        raise ValueError("prompts.num_prompts=1 with images_per_prompt=1 has no spread of rewards; give 2 samples")


def _check_sizes(config: Config, world_size: int) -> None:
    """Processes share prompts evenly, updates share transitions evenly, micro-batches fill an update exactly."""
    num_prompts, update = config.prompts.num_prompts, config.update
    if num_prompts % world_size:
        up = -(-num_prompts // world_size) * world_size
        raise ValueError(f"prompts.num_prompts={num_prompts} does not divide by the {world_size} processes; try {up}")
    transitions = num_prompts * config.prompts.images_per_prompt * num_actions(config) // world_size
    if transitions % update.num_updates:
        raise ValueError(
            f"update.num_updates={update.num_updates} does not divide the {transitions} transitions of a pass "
            f"on each process; try {_near_divisors(transitions, update.num_updates)}"
        )
    in_update = transitions // update.num_updates
    if in_update % update.micro_batch_size:
        raise ValueError(
            f"update.micro_batch_size={update.micro_batch_size} does not divide the {in_update} transitions "
            f"of an update on each process; try {_near_divisors(in_update, update.micro_batch_size)}"
        )


def _check_groups(config: Config, world_size: int) -> None:
    """Groups of set rewards are whole, in a rollout on each process and in an evaluation of all; see rewards/groups.py.

    Of the tasks' shares in a batch the config knows nothing: `GroupReward.groups` checks those.
    """
    trained = {f"rewards[{i}]": reward for i, reward in enumerate(config.rewards)}
    watched = {f"evaluation.rewards[{i}]": reward for i, reward in enumerate(config.evaluation.rewards)}
    for field, reward in {**trained, **watched}.items():
        if reward.group_size < 0:
            raise ValueError(f"{field}.group_size={reward.group_size} is out of range; give 0 (all images) or more")
    samples = config.prompts.num_prompts * config.prompts.images_per_prompt // world_size
    for field, reward in trained.items():
        if reward.credit == "leave_one_out" and (reward.group_size or samples) == 1:
            remedy = f"set {field}.group_size to 2 or more"
            raise ValueError(f"{field}.credit=leave_one_out leaves nothing of a group of one image; {remedy}")
        _check_group(field, reward, samples, f"the {samples} samples of an iteration on each process")
    if config.evaluation.every > 0:
        images = config.evaluation.num_images
        for field, reward in {**trained, **watched}.items():
            _check_group(field, reward, images, f"evaluation.num_images={images}")


def _check_group(field: str, reward: RewardConfig, num_images: int, images: str) -> None:
    size = reward.group_size
    if size and num_images % size:
        near = _near_divisors(num_images, size)
        raise ValueError(f"{field}.group_size={size} does not divide {images}; try {near}, or change their number")


def _check_pretraining(config: Config, world_size: int) -> None:
    """There are pairs to train on, shared evenly, in whole micro-batches."""
    pretraining = config.pretraining
    if pretraining.weight == 0:
        return
    if not pretraining.data.strip():
        raise ValueError(
            f"pretraining.weight={pretraining.weight} needs pretraining.data: a folder of captioned images, a .jsonl"
            " file, .tar shards, hf:PATH or shapes:all; name one, or set pretraining.weight=0"
        )
    size = pretraining.batch_size
    if size % world_size:
        up = -(-size // world_size) * world_size
        raise ValueError(f"pretraining.batch_size={size} does not divide by the {world_size} processes; try {up}")
    share, micro = size // world_size, pretraining.micro_batch_size
    if share % micro:
        raise ValueError(
            f"pretraining.micro_batch_size={micro} does not divide the {share} pairs of an update on each process;"
            f" try {_near_divisors(share, micro)}"
        )


def _near_divisors(number: int, wish: int) -> str:
    """The divisors of `number` around `wish`, as '32 or 48'."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wish][-1:]
    above = [n for n in divisors if n > wish][:1]
    return " or ".join(str(n) for n in below + above)


def _check_lora(config: Config) -> None:
    if not all(target.strip() for target in config.lora.targets) or not config.lora.targets:
        raise ValueError(f"lora.targets={config.lora.targets} names no layer; give names of layers, as [to_q, to_v]")


def _check_resume(config: Config) -> None:
    resume = config.resume
    if resume is not None and resume != "latest" and not Path(resume).is_dir():
        raise ValueError(f"resume={resume} is no folder; give 'latest' or a folder in {config.run_dir}/checkpoints")
