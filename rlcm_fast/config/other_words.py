"""What other trainers call our fields, for whoever writes the word that they know."""

from __future__ import annotations

_WORDS = {
    "model.path": "pretrained_model_name_or_path pretrained_model model_name model_path model_id",
    "model.image_size": "resolution height width",
    "lora.rank": "lora_rank lora_r rank use_lora",
    "lora.alpha": "lora_alpha",
    "policy.num_steps": "num_inference_steps sample_num_steps",
    "policy.guidance_scale": "cfg cfg_scale sample_guidance_scale",
    "policy.eta": "sample_eta",
    "prompts.source": "prompt_fn prompt_function prompt_file dataset dataset_name",
    "prompts.num_prompts, times prompts.images_per_prompt": "batch_size train_batch_size sample_batch_size",
    "prompts.images_per_prompt": "num_generations num_images_per_prompt images_per_group",
    "prompts.negative": "negative_prompt",
    "rewards, as [{name: NAME}]": "reward reward_fn reward_funcs reward_model",
    "update.micro_batch_size, from which the accumulation of gradients follows": (
        "per_device_train_batch_size gradient_accumulation_steps accumulation_steps micro_batch"
    ),
    "update.num_passes": "num_inner_epochs ppo_epochs",
    "update.clip_range": "train_clip_range cliprange epsilon",
    "update.kl_weight": "kl_coef kl_beta beta init_kl_coef",
    "update.max_grad_norm": "train_max_grad_norm gradient_clipping",
    "optimizer.lr": "learning_rate lr train_learning_rate",
    "optimizer.betas": "adam_beta1 adam_beta2 train_adam_beta1 train_adam_beta2",
    "optimizer.warmup_updates": "warmup_steps lr_warmup_steps",
    "optimizer.final_lr_fraction": "lr_scheduler lr_scheduler_type",
    "engine.dtype": "mixed_precision precision fp16 bf16",
    "engine.recompute": "gradient_checkpointing",
    "ema.decay": "use_ema ema_decay",
    "num_iterations": "epochs num_epochs num_train_epochs max_steps max_train_steps",
    "evaluation.every": "eval_every eval_freq eval_steps validation_steps",
    "checkpoint.every": "save_every save_freq save_steps checkpointing_steps",
    "tracking.wandb": "report_to use_wandb log_with",
    "run_dir": "output_dir logdir log_dir logging_dir save_dir",
    "resume": "resume_from resume_from_checkpoint",
    "the launcher's, as deepspeed --num_gpus 2": "num_gpus num_processes nproc_per_node",
}


def meaning_of(word: str) -> str | None:
    """Returns our field for the word of another tool; None if none of them uses it."""
    plain = word.replace("-", "_").lower()
    return next((ours for ours, words in _WORDS.items() if plain in words.split()), None)
