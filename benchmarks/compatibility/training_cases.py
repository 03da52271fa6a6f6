"""The small runs that same_results.py trains twice: one for each part of the trainer that has numbers of its own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """A run of train.py whose config and fields both trees understand."""

    name: str
    config: str  # a file of configs/, without its ending
    settings: Mapping[str, object]  # by dotted field
    processes: int = 1
    resumes_after: int = 0  # iterations that the old tree trains before both trees go on; 0: both begin by themselves

    def options(self) -> list[str]:
        """The options of train.py, but for run_dir and resume."""
        config = Path("configs") / f"{self.config}.yaml"
        options = ["--config", str(config)]
        for field, value in self.settings.items():
            options += [f"--{field}", _as_text(value)]
        return options


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


# 16 images of 3 actions make 48 transitions: two micro-batches. Evaluations, grids and checkpoints fall inside the run.
SMALL: dict[str, object] = {
    "num_iterations": 4,
    "prompts.num_prompts": 4,
    "prompts.images_per_prompt": 4,
    "rollout.micro_batch_size": 8,
    "update.micro_batch_size": 24,
    "advantages.buffer_size": 8,
    "advantages.min_count": 4,  # so that a prompt's own statistics are used within four iterations
    "optimizer.warmup_updates": 2,
    "evaluation.every": 2,
    "evaluation.num_images": 8,
    "evaluation.micro_batch_size": 8,
    "checkpoint.every": 2,
    "tracking.tensorboard": False,
    "tracking.grid_every": 2,
    "tracking.grid_images": 4,
}
# distribution_parity scores 16 images of a prompt at once: with several tasks, a quarter of an iteration's.
TASKS: dict[str, object] = {
    **SMALL,
    "num_iterations": 3,
    "prompts.num_prompts": 8,
    "prompts.images_per_prompt": 8,
    "rollout.micro_batch_size": 32,
    "update.micro_batch_size": 48,
    "evaluation.num_images": 16,
    "tracking.task_gradients_every": 2,
}
REAL_IMAGES: dict[str, object] = {
    "pretraining.data": "shapes:one",
    "pretraining.weight": 0.5,
    "pretraining.batch_size": 16,
    "pretraining.micro_batch_size": 8,
}
DDPO: dict[str, object] = {
    **SMALL,
    "num_iterations": 2,
    "policy.num_steps": 6,
    "update.num_timesteps": 3,
    "update.num_updates": 3,
    "update.order": "by_step",
    "update.micro_batch_size": 8,
}
IN_BACKWARD: dict[str, object] = {
    **SMALL,
    "engine.dtype": "pure_bf16",
    "engine.optimizer_in_backward": True,
    "optimizer.name": "adamw_8bit",
    "update.micro_batch_size": 48,  # one backward pass an update
}
PARITY = {**SMALL, **REAL_IMAGES, "prompts.images_per_prompt": 16, "evaluation.num_images": 16}
TWO_UPDATES = {**SMALL, "update.num_updates": 2}
BF16 = {**SMALL, "engine.dtype": "bf16", "engine.zero_stage": 1, "engine.recompute": "block"}
GROUPS = {"advantages.kind": "group", "advantages.scale": "group"}
TWO_PASSES = {**TWO_UPDATES, "update.num_passes": 2, "update.old_log_probs": "recompute"}
# Two processes: 8 images each, 24 transitions, two micro-batches.
SHARED = {**SMALL, "update.micro_batch_size": 12}
AVERAGED = {**SMALL, "ema.decay": 0.9}

ONE = "shapes/compressibility"
CASES = (
    Case("compressibility", ONE, SMALL),
    Case("alignment", "shapes/alignment", {**SMALL, "rollout.shared_noise": True}),
    Case("tasks_by_task", "shapes/joint", {**TASKS, "task_schedule": "by_task"}),
    Case("tasks_mixed", "shapes/joint", {**TASKS, "task_schedule": "mixed"}),
    Case("real_images", "shapes/fairness", PARITY),
    Case("lora_kl", ONE, {**TWO_UPDATES, "lora.rank": 4, "update.kl_weight": 0.1}),
    Case("kl_offload", ONE, {**TWO_UPDATES, "update.kl_reference": "offload"}),
    Case("rebel", ONE, {**TWO_UPDATES, "algorithm.name": "rebel", "algorithm.eta": 0.5}),
    Case("grpo", ONE, {**TWO_UPDATES, **GROUPS, "algorithm.name": "grpo"}),
    Case("reinforce", ONE, {**SMALL, "algorithm.name": "reinforce", "advantages.kind": "leave_one_out"}),
    Case("dpok", ONE, {**TWO_UPDATES, "algorithm.name": "dpok", "update.kl_weight": 0.05}),
    Case("rwr", ONE, {**TWO_UPDATES, "algorithm.name": "rwr", "algorithm.temperature": 0.5}),
    Case("ddpo", "shapes/ddpo_compressibility", DDPO),
    Case("recomputed_ratios", ONE, TWO_PASSES),
    Case("last_step_renoise", ONE, {**SMALL, "policy.last_step": "renoise", "update.micro_batch_size": 32}),
    Case("last_step_sampled", ONE, {**SMALL, "policy.last_step": "sampled", "update.micro_batch_size": 32}),
    Case("in_backward", ONE, IN_BACKWARD),
    Case("bf16_recompute", ONE, BF16),
    Case("average", ONE, AVERAGED),
    Case("two_processes_zero_1", ONE, {**SHARED, "engine.zero_stage": 1}, processes=2),
    Case("two_processes_zero_3", ONE, {**SHARED, "engine.zero_stage": 3}, processes=2),
    Case("resume", ONE, AVERAGED, resumes_after=2),
    Case("resume_tasks", "shapes/joint", {**TASKS, **REAL_IMAGES, "num_iterations": 4}, resumes_after=2),
    Case("resume_zero_1", ONE, {**SHARED, "engine.zero_stage": 1}, processes=2, resumes_after=2),
    Case("resume_zero_3", ONE, {**SHARED, "engine.zero_stage": 3, "lora.rank": 4}, processes=2, resumes_after=2),
)
