"""Every field of TRL's DDPOConfig arrives where it belongs, or is refused in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast.compat import DDPOConfig
from rlcm_fast.compat.fields import Translated, translated
from rlcm_fast.config import Config
from rlcm_fast.config.resolved import resolve

# The fields of TRL 0.23.1.
FIELDS = """
exp_name run_name seed log_with tracker_kwargs accelerator_kwargs project_kwargs tracker_project_name logdir num_epochs
save_freq num_checkpoint_limit mixed_precision allow_tf32 resume_from sample_num_steps sample_eta sample_guidance_scale
sample_batch_size sample_num_batches_per_epoch train_batch_size train_use_8bit_adam train_learning_rate train_adam_beta1
train_adam_beta2 train_adam_weight_decay train_adam_epsilon train_gradient_accumulation_steps train_max_grad_norm
train_num_inner_epochs train_cfg train_adv_clip_max train_clip_range train_timestep_fraction per_prompt_stat_tracking
per_prompt_stat_tracking_buffer_size per_prompt_stat_tracking_min_count async_reward_computation max_workers
negative_prompts push_to_hub
"""


def value_of(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def config_of(use_lora: bool = False, **fields: Any) -> Config:
    return translated(DDPOConfig(**fields), use_lora).config()


def test_the_fields_are_those_of_trl():
    assert [name for name in DDPOConfig().to_dict() if "/" not in name] == [
        name for name in FIELDS.split() if not name.endswith("_kwargs")
    ]
    assert set(FIELDS.split()) == set(DDPOConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("given", "name", "value"),
    [
        ({"seed": 7}, "seed", 7),
        ({"num_epochs": 9}, "num_iterations", 9),
        ({"save_freq": 3}, "checkpoint.every", 3),
        ({"num_checkpoint_limit": 4}, "checkpoint.keep", 4),
        ({"project_kwargs": {"total_limit": 2}}, "checkpoint.keep", 2),
        ({"project_kwargs": {"project_dir": "save"}}, "run_dir", "save"),
        ({"run_name": "cats", "exp_name": "x"}, "run_dir", "runs/cats"),
        ({"exp_name": "x"}, "run_dir", "runs/x"),
        ({}, "policy.kind", "ddim"),
        ({}, "policy.num_steps", 50),
        ({"sample_eta": 0.5}, "policy.eta", 0.5),
        ({"sample_guidance_scale": 7.5}, "policy.guidance_scale", 7.5),
        ({"sample_batch_size": 6, "sample_num_batches_per_epoch": 4}, "prompts.num_prompts", 24),
        ({"negative_prompts": "ugly"}, "prompts.negative", "ugly"),
        ({}, "prompts.images_per_prompt", 1),
        ({"sample_batch_size": 6}, "rollout.micro_batch_size", 6),
        ({}, "rollout.reward_workers", 1),
        ({"async_reward_computation": True, "max_workers": 3}, "rollout.reward_workers", 3),
        ({"train_learning_rate": 1e-5}, "optimizer.lr", 1e-5),
        ({"train_adam_beta1": 0.8, "train_adam_beta2": 0.95}, "optimizer.betas", (0.8, 0.95)),
        ({"train_adam_weight_decay": 0.1}, "optimizer.weight_decay", 0.1),
        ({"train_adam_epsilon": 1e-6}, "optimizer.eps", 1e-6),
        ({"train_use_8bit_adam": True}, "optimizer.name", "bnb_adamw_8bit"),
        ({"train_max_grad_norm": 0.5}, "update.max_grad_norm", 0.5),
        ({"train_num_inner_epochs": 2}, "update.num_passes", 2),
        ({"train_adv_clip_max": 10}, "update.advantage_clip", 10.0),
        ({"train_clip_range": 1e-3}, "update.clip_range", 1e-3),
        ({"train_timestep_fraction": 0.5}, "update.num_timesteps", 25),
        ({"train_timestep_fraction": 0.99}, "update.num_timesteps", 0),  # all 49 that are actions
        ({}, "advantages.kind", "batch"),
        ({"per_prompt_stat_tracking": True}, "advantages.kind", "prompt"),
        ({"per_prompt_stat_tracking_buffer_size": 32}, "advantages.buffer_size", 32),
        ({"per_prompt_stat_tracking_min_count": 8}, "advantages.min_count", 8),
        ({"mixed_precision": "no"}, "engine.dtype", "fp32"),
        ({"mixed_precision": "bf16"}, "engine.zero_stage", 1),
        ({"mixed_precision": "bf16", "use_lora": True}, "engine.zero_stage", 0),
        ({"use_lora": True}, "lora.rank", 4),
        ({"use_lora": True}, "lora.alpha", 4.0),
        ({"log_with": "tensorboard"}, "tracking.tensorboard", True),
        ({"log_with": "wandb"}, "tracking.wandb", True),
        ({"resume_from": "save/checkpoints/iteration_000002"}, "run_dir", "save"),
        ({"train_cfg": False, "sample_guidance_scale": 1.0}, "policy.guidance_scale", 1.0),
    ],
)
def test_a_field_arrives(given: dict[str, Any], name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "save" / "checkpoints" / "iteration_000002").mkdir(parents=True)
    assert value_of(config_of(**given), name) == value


def test_an_update_has_as_many_samples_as_trls():
    config = config_of(
        sample_num_steps=20,
        sample_batch_size=8,
        sample_num_batches_per_epoch=4,
        train_batch_size=4,
        train_gradient_accumulation_steps=2,
        train_num_inner_epochs=3,
    )
    sizes = resolve(config, 1).sizes
    assert sizes.samples_per_iteration == 32
    assert sizes.transitions_per_update == 4 * 2 * 19
    assert sizes.updates_per_iteration == 3 * 32 // (4 * 2)
    assert sizes.micro_batches_per_update_and_process == 2 * 19


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"accelerator_kwargs": {"cpu": True}}, "accelerator_kwargs={'cpu': True} is for accelerate"),
        ({"project_kwargs": {"iteration": 3}}, "project_kwargs={'iteration': 3} is for accelerate"),
        ({"log_with": "comet_ml"}, "log_with=comet_ml is not allowed; give tensorboard, wandb or None"),
        ({"log_with": "wandb", "tracker_kwargs": {"wandb": {}}}, "tracker_kwargs={'wandb': {}} is for accelerate's"),
        ({"mixed_precision": "fp8"}, "mixed_precision=fp8 is not allowed; give no, bf16 or fp16"),
        ({"train_cfg": False}, "train_cfg=False trains another policy than the one that sample_guidance_scale=5"),
        ({"sample_batch_size": 3, "train_batch_size": 2}, "sample_batch_size=3 must divide by train_batch_size=2"),
        ({"train_gradient_accumulation_steps": 3}, "an epoch has 2 samples"),
        ({"train_timestep_fraction": 0.001}, "train_timestep_fraction=0.001 trains 0 of 50 steps"),
        (
            {"sample_eta": 0.0},
            "policy.eta=0.0 is out of range; give a number in (0, 1]: without noise there is no action "
            "(policy.eta is sample_eta of DDPOConfig)",
        ),
        ({"train_adam_beta1": 1.0}, "(optimizer.betas[0] is train_adam_beta1 of DDPOConfig)"),
        ({"resume_from": "nothing/checkpoints/iteration_000001"}, "(resume is resume_from of DDPOConfig)"),
    ],
)
def test_what_has_no_counterpart_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(ValueError) as error:
        config_of(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_different_is_said():
    found: Translated = translated(
        DDPOConfig(project_kwargs={"logging_dir": "logs"}, log_with="wandb", tracker_project_name="mine"), use_lora=True
    )
    said = " ".join(found.notes)
    assert "fp16 is bf16 here" in said and "'logging_dir'" in said and "tracker_project_name=mine" in said


def test_a_wrong_field_is_found_without_torch():
    code = """
import sys
from rlcm_fast.compat import DDPOConfig
from rlcm_fast.compat.fields import translated
translated(DDPOConfig(mixed_precision="no"), use_lora=False).config()
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
