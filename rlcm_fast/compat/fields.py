"""What each field of a DDPOConfig is in a config of rlcm_fast, or the line that refuses it; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rlcm_fast.compat.config import DDPOConfig
from rlcm_fast.config import Config, config_of
from rlcm_fast.config.checks import validate
from rlcm_fast.config.files import local_path

PROMPTS, REWARD = "python:prompt_function", "python:reward_function"
LORA_RANK = 4  # TRL's, and its alpha

# TRL's name of each of our fields, for the messages of our checks.
_NAMES = {
    "seed": "seed",
    "num_iterations": "num_epochs",
    "run_dir": "project_kwargs['project_dir']",
    "resume": "resume_from",
    "checkpoint.every": "save_freq",
    "checkpoint.keep": "num_checkpoint_limit, or project_kwargs['total_limit'],",
    "engine.dtype": "mixed_precision",
    "policy.num_steps": "sample_num_steps",
    "policy.eta": "sample_eta",
    "policy.guidance_scale": "sample_guidance_scale",
    "prompts.num_prompts": "sample_batch_size * sample_num_batches_per_epoch",
    "prompts.negative": "negative_prompts",
    "rollout.micro_batch_size": "sample_batch_size",
    "rollout.reward_workers": "max_workers",
    "update.micro_batch_size": "train_batch_size",
    "update.num_passes": "train_num_inner_epochs",
    "update.num_timesteps": "sample_num_steps * train_timestep_fraction",
    "update.clip_range": "train_clip_range",
    "update.advantage_clip": "train_adv_clip_max",
    "update.max_grad_norm": "train_max_grad_norm",
    "optimizer.lr": "train_learning_rate",
    "optimizer.betas[0]": "train_adam_beta1",
    "optimizer.betas[1]": "train_adam_beta2",
    "optimizer.eps": "train_adam_epsilon",
    "optimizer.weight_decay": "train_adam_weight_decay",
    "optimizer.name": "train_use_8bit_adam",
    "advantages.buffer_size": "per_prompt_stat_tracking_buffer_size",
    "advantages.min_count": "per_prompt_stat_tracking_min_count",
}


@dataclass(frozen=True)
class Translated:
    """Fields of a config, and what the user should know about them."""

    fields: Mapping[str, Any]  # keywords of config_of
    notes: tuple[str, ...]

    def config(self, **more: Any) -> Config:
        """Returns the checked config under further keywords; a message about a field adds TRL's name of it."""
        with _in_trls_words():
            config = config_of(None, {**self.fields, **more})
            validate(config, world_size=1)
        return config


def translated(config: DDPOConfig, use_lora: bool) -> Translated:
    """Returns the fields of a config; raises ValueError with one line for a setting that has no counterpart."""
    notes: list[str] = []
    fields = {
        **_of_run(config, notes),
        **_of_sampling(config),
        **_of_updates(config),
        **_of_precision(config, use_lora, notes),
        **_of_tracking(config, notes),
    }
    return Translated(fields, tuple(notes))


def _of_run(config: DDPOConfig, notes: list[str]) -> dict[str, Any]:
    # Refuse what accelerate alone understands.
    project = dict(config.project_kwargs)
    run_dir = project.pop("project_dir", None) or f"runs/{config.run_name or config.exp_name or 'ddpo'}"
    keep = project.pop("total_limit", None) or config.num_checkpoint_limit
    project.pop("automatic_checkpoint_naming", None)  # checkpoints have the names of their iterations
    logging_dir = project.pop("logging_dir", None)
    if logging_dir is not None:
        notes.append(f"project_kwargs['logging_dir']={logging_dir} is not used: events are in {run_dir}/events")
    for name, given in (("accelerator_kwargs", config.accelerator_kwargs), ("project_kwargs", project)):
        if given:
            raise ValueError(f"{name}={given} is for accelerate, which does not run this training; leave it out")

    # A folder goes on with its newest checkpoint, a checkpoint with itself.
    resume: dict[str, Any] = {}
    if config.resume_from:
        folder = local_path(config.resume_from)
        is_checkpoint = folder.parent.name == "checkpoints"
        run_dir = str(folder.parent.parent if is_checkpoint else folder)
        resume = {"resume": str(folder) if is_checkpoint else "latest"}
    every = {"checkpoint__every": config.save_freq, "checkpoint__keep": keep}
    return {"run_dir": run_dir, "seed": config.seed, "num_iterations": config.num_epochs, **resume, **every}


def _of_sampling(config: DDPOConfig) -> dict[str, Any]:
    if not config.train_cfg and config.sample_guidance_scale > 1:
        raise ValueError(
            f"train_cfg=False trains another policy than the one that sample_guidance_scale="
            f"{config.sample_guidance_scale:g} samples; set train_cfg=True, or sample_guidance_scale=1"
        )
    return {
        "policy__kind": "ddim",
        "policy__num_steps": config.sample_num_steps,
        "policy__eta": config.sample_eta,
        "policy__guidance_scale": config.sample_guidance_scale,
        "prompts__num_prompts": config.sample_batch_size * config.sample_num_batches_per_epoch,
        "prompts__negative": config.negative_prompts,
        "prompts__images_per_prompt": 1,  # every image asks the prompt function
        "rollout__micro_batch_size": config.sample_batch_size,
        "rollout__reward_workers": config.max_workers if config.async_reward_computation else 1,
        "advantages__kind": "prompt" if config.per_prompt_stat_tracking else "batch",
        "advantages__buffer_size": config.per_prompt_stat_tracking_buffer_size,
        "advantages__min_count": config.per_prompt_stat_tracking_min_count,
    }


def _of_updates(config: DDPOConfig) -> dict[str, Any]:
    # Samples of an epoch must make whole updates of whole batches.
    samples = config.sample_batch_size * config.sample_num_batches_per_epoch
    per_update = config.train_batch_size * config.train_gradient_accumulation_steps
    for name, value in (("sample_batch_size", config.sample_batch_size), ("train_batch_size", config.train_batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")
    if config.sample_batch_size % config.train_batch_size:
        raise ValueError(
            f"sample_batch_size={config.sample_batch_size} must divide by train_batch_size={config.train_batch_size}"
        )
    if per_update < 1 or samples % per_update:
        raise ValueError(
            f"an epoch has {samples} samples (sample_batch_size * sample_num_batches_per_epoch), which must divide by "
            f"train_batch_size * train_gradient_accumulation_steps={per_update}"
        )

    # A share of the steps is trained; 0 stands for all.
    trained = int(config.sample_num_steps * config.train_timestep_fraction)
    if not 0 < trained <= config.sample_num_steps:
        raise ValueError(
            f"train_timestep_fraction={config.train_timestep_fraction} trains {trained} of "
            f"{config.sample_num_steps} steps; give a share in (0, 1]"
        )
    return {
        "update__num_updates": samples // per_update,
        "update__num_passes": config.train_num_inner_epochs,
        "update__num_timesteps": trained if trained < config.sample_num_steps - 1 else 0,
        "update__micro_batch_size": config.train_batch_size,
        "update__clip_range": config.train_clip_range,
        "update__advantage_clip": config.train_adv_clip_max,
        "update__max_grad_norm": config.train_max_grad_norm,
        "optimizer__name": "bnb_adamw_8bit" if config.train_use_8bit_adam else "adamw",
        "optimizer__lr": config.train_learning_rate,
        "optimizer__betas": [config.train_adam_beta1, config.train_adam_beta2],
        "optimizer__eps": config.train_adam_epsilon,
        "optimizer__weight_decay": config.train_adam_weight_decay,
    }


def _of_precision(config: DDPOConfig, use_lora: bool, notes: list[str]) -> dict[str, Any]:
    if config.mixed_precision not in ("no", "bf16", "fp16"):
        raise ValueError(f"mixed_precision={config.mixed_precision} is not allowed; give no, bf16 or fp16")
    if config.mixed_precision == "fp16":
        notes.append("mixed_precision=fp16 is bf16 here, which needs as much memory and no loss scaling")
    is_half = config.mixed_precision != "no"
    fields: dict[str, Any] = {"engine__dtype": "bf16" if is_half else "fp32"}
    if is_half and not use_lora:
        fields["engine__zero_stage"] = 1  # float32 master weights
    if use_lora:
        targets = ["to_k", "to_q", "to_v", "to_out.0"]
        fields |= {"lora__rank": LORA_RANK, "lora__alpha": LORA_RANK, "lora__targets": targets}
    return fields


def _of_tracking(config: DDPOConfig, notes: list[str]) -> dict[str, Any]:
    tracker = config.log_with
    if tracker not in (None, "tensorboard", "wandb"):
        raise ValueError(f"log_with={tracker} is not allowed; give tensorboard, wandb or None")
    if tracker is not None and config.tracker_kwargs:
        raise ValueError(f"tracker_kwargs={config.tracker_kwargs} is for accelerate's trackers; leave it out")
    if tracker == "wandb" and config.tracker_project_name != "trl":
        notes.append(f"tracker_project_name={config.tracker_project_name} is not used: the project is rlcm_fast")
    return {
        "tracking__tensorboard": tracker == "tensorboard",
        "tracking__wandb": tracker == "wandb",
        "tracking__grid_every": 0,  # the hook shows images
        "evaluation__every": 0,
    }


@contextmanager
def _in_trls_words() -> Iterator[None]:
    """Adds TRL's name of a field to a message that begins with ours."""
    try:
        yield
    except ValueError as error:
        field = re.match(r"[\w.\[\]]+", str(error))
        name = _NAMES.get(field[0]) if field else None
        if name is None or name == (field and field[0]):
            raise
        raise ValueError(f"{error} ({field[0] if field else ''} is {name} of DDPOConfig)") from error
