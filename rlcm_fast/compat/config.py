"""DDPOConfig with the fields and defaults of TRL 0.23, also for HfArgumentParser; fields.py translates them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, field
from typing import Any, Optional


def _script_name() -> str:
    return os.path.basename(sys.argv[0]).removesuffix(".py")


@dataclass
class DDPOConfig:
    """Settings of a DDPOTrainer; an epoch is an iteration of rlcm_fast."""

    exp_name: str = field(default_factory=_script_name)
    """Names the run's folder, if project_kwargs has no project_dir and run_name is empty."""
    run_name: str = ""
    """Names the run's folder before exp_name does."""
    seed: int = 0
    log_with: Optional[str] = None  # noqa: UP045 (HfArgumentParser reads this form)
    """tensorboard or wandb; the run's folder has metrics.jsonl in any case."""
    tracker_kwargs: dict = field(default_factory=dict)
    accelerator_kwargs: dict = field(default_factory=dict)
    project_kwargs: dict = field(default_factory=dict)
    """project_dir is the run's folder, total_limit the number of checkpoints to keep."""
    tracker_project_name: str = "trl"
    logdir: str = "logs"
    num_epochs: int = 100
    save_freq: int = 1
    """Epochs between checkpoints."""
    num_checkpoint_limit: int = 5
    mixed_precision: str = "fp16"
    """no (float32), bf16, or fp16, which is bf16 here."""
    allow_tf32: bool = True
    resume_from: str = ""
    """A run's folder or one of its checkpoints."""
    sample_num_steps: int = 50
    sample_eta: float = 1.0
    sample_guidance_scale: float = 5.0
    sample_batch_size: int = 1
    sample_num_batches_per_epoch: int = 2
    train_batch_size: int = 1
    """Samples of a step, and so transitions, per forward and backward pass."""
    train_use_8bit_adam: bool = False
    train_learning_rate: float = 3e-4
    train_adam_beta1: float = 0.9
    train_adam_beta2: float = 0.999
    train_adam_weight_decay: float = 1e-4
    train_adam_epsilon: float = 1e-8
    train_gradient_accumulation_steps: int = 1
    """An update has train_batch_size * train_gradient_accumulation_steps samples, with all their trained steps."""
    train_max_grad_norm: float = 1.0
    train_num_inner_epochs: int = 1
    train_cfg: bool = True
    train_adv_clip_max: float = 5.0
    train_clip_range: float = 1e-4
    train_timestep_fraction: float = 1.0
    per_prompt_stat_tracking: bool = False
    per_prompt_stat_tracking_buffer_size: int = 16
    per_prompt_stat_tracking_min_count: int = 16
    async_reward_computation: bool = False
    max_workers: int = 2
    negative_prompts: str = ""
    push_to_hub: bool = False
    """Does nothing by itself, as in TRL; a script may read it and call DDPOTrainer.push_to_hub."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields; those of nested mappings as section/field."""
        flat: dict[str, Any] = {}
        for name, value in asdict(self).items():
            flat |= {f"{name}/{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
        return flat
