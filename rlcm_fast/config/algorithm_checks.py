"""Checks what an algorithm needs from the other sections of the config."""

from __future__ import annotations

from rlcm_fast.config import Config
from rlcm_fast.config.resolved import ResolvedRun


def check_algorithm(run: ResolvedRun) -> None:
    """Raises ValueError "field=value ...; remedy" if the algorithm, or the choice of trained steps, cannot work."""
    # Each algorithm has needs of its own.
    config, update = run.config, run.config.update
    name = config.algorithm.name
    if update.rollout_lag > 0:
        _check_lag(run)
    if name == "reinforce" and not update.is_on_policy:
        num_updates = update.num_passes * update.num_updates
        raise ValueError(
            f"algorithm.name=reinforce has no ratio to correct for weights that have moved, so only the first of "
            f"{num_updates} updates per rollout would be right; set update.num_updates=1 and update.num_passes=1, or "
            "algorithm.name=ppo"
        )
    if name == "dpok" and update.kl_weight == 0:
        raise ValueError(
            "algorithm.name=dpok is PPO with a KL term, and update.kl_weight=0 switches it off; give a weight, as 0.05,"
            " or algorithm.name=ppo"
        )
    if name == "grpo":
        _check_groups(run)
    if name == "rebel":
        _check_pairs(run)
    _check_timesteps(run)

    # The start model of the KL term must be able to wait in CPU memory.
    if update.kl_reference == "offload" and config.engine.zero_stage == 3:
        raise ValueError(
            "update.kl_reference=offload swaps whole weights, and engine.zero_stage=3 shares them out; set "
            "engine.zero_stage=2, or update.kl_reference=copy"
        )
    if update.kl_reference == "offload" and config.lora.rank > 0:
        raise ValueError(
            f"update.kl_reference=offload has no use with lora.rank={config.lora.rank}: the start model is the network "
            "without its adapters, and needs no memory; leave kl_reference out"
        )


def lag_problem(config: Config) -> str:
    """Returns why a config cannot train on images that are one update old, with the way out; "" if it can."""
    if config.algorithm.name not in ("ppo", "grpo", "dpok"):
        return (
            f"update.rollout_lag=1 trains on images that are one update old, and algorithm.name={config.algorithm.name}"
            " has no clipped ratio to correct for that; set update.rollout_lag=0, or algorithm.name=ppo"
        )
    if config.update.old_log_probs == "recompute":
        return (
            "update.rollout_lag=1 needs the log-probs of the weights that drew the images, and update.old_log_probs="
            "recompute replaces them by those of present weights; set update.old_log_probs=rollout"
        )
    return ""


def _check_lag(run: ResolvedRun) -> None:
    """Refuses images of older weights where nothing corrects for them, or where their rewards could not go on."""
    problem = lag_problem(run.config)
    if problem:
        raise ValueError(problem)
    for task in run.tasks:
        for index, reward in enumerate(task.rewards):
            if reward.offload:
                raise ValueError(
                    f"{task.rewards_field}[{index}].offload=true of {reward.name} takes its model away while "
                    "update.rollout_lag=1 still scores the next rollout; drop one of them"
                )


def _check_groups(run: ResolvedRun) -> None:
    for task in run.tasks:
        if task.advantages not in ("group", "leave_one_out"):
            raise ValueError(
                f"algorithm.name=grpo compares the images of one prompt, and {task.advantages_field}={task.advantages} "
                f"does not; set {task.advantages_field}=group, or algorithm.name=ppo"
            )


def _check_pairs(run: ResolvedRun) -> None:
    update = run.config.update
    for task in run.tasks:
        if task.images_per_prompt % 2:
            raise ValueError(
                f"{task.images_field}={task.images_per_prompt} leaves an image without another of its prompt, "
                f"and algorithm.name=rebel takes pairs; give {task.images_per_prompt + 1}"
            )
    if update.num_timesteps > 0 or update.order == "by_step":
        raise ValueError(
            f"algorithm.name=rebel sums log-probs over all actions of a sample, so update.num_timesteps="
            f"{update.num_timesteps} and update.order={update.order} leave it half a sum; set 0 and mixed"
        )
    if update.step_weights != "equal":
        raise ValueError(
            f"update.step_weights={update.step_weights} would weigh the actions of algorithm.name=rebel's sum in the "
            "gradient alone, which is then of no loss; set update.step_weights=equal"
        )


def _check_timesteps(run: ResolvedRun) -> None:
    update, num_actions = run.config.update, run.sizes.actions_per_sample
    if update.num_timesteps > num_actions:
        raise ValueError(
            f"update.num_timesteps={update.num_timesteps} exceeds the {num_actions} actions of "
            f"policy.num_steps={run.config.policy.num_steps}; give fewer, or 0 for all"
        )
    trained = run.sizes.trained_actions_per_sample
    if update.order == "by_step" and trained % update.num_updates:
        raise ValueError(
            f"update.num_updates={update.num_updates} does not divide the {trained} trained actions of a sample, which "
            f"update.order=by_step hands out whole; try {trained}, one update per step"
        )
