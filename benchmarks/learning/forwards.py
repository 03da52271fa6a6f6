"""Network forwards of an iteration, from the config alone: rows through the UNet, in sampling and in training.

    sampling    samples x steps x guidance
    training    trained transitions x passes x guidance (each has a backward pass too, which is not counted)
    rebel       the transitions of every update but the first of a rollout once more, to see how log-probs have changed
    KL          trained transitions x guidance, once a rollout
    L_pre       pairs of an update x updates

guidance is 2 where a row takes an unconditional one beside it, as in every diffusion model guided by more than 1, and 1
where the network is told its guidance or there is none. Left out: evaluations, the ratio's check in the first
iteration, and that transitions without a signal are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path

from rlcm_fast.config import Config
from rlcm_fast.config.resolved import resolve


def forwards_per_iteration(config: Config) -> int:
    """Network forwards of an iteration, over all processes."""
    run = resolve(config, 1)
    forwards = 0
    for tasks in run.rounds:
        num_samples = sum(task.num_samples for task in tasks)
        forwards += _of_round(config, num_samples, num_samples * run.sizes.trained_actions_per_sample)
    return forwards


def _of_round(config: Config, num_samples: int, transitions: int) -> int:
    update, pretraining = config.update, config.pretraining
    num_updates = update.num_passes * update.num_updates
    once_more = transitions * update.num_passes * (num_updates - 1) // num_updates
    rows = num_samples * config.policy.num_steps + transitions * update.num_passes
    rows += once_more if config.algorithm.name == "rebel" else 0
    rows += transitions if update.kl_weight > 0 else 0
    pairs = pretraining.batch_size * num_updates if pretraining.weight > 0 else 0
    return rows * rows_of_a_forward(config) + pairs


def rows_of_a_forward(config: Config) -> int:
    """2 with an unconditional half, else 1."""
    is_guided = config.policy.guidance_scale != 1
    is_told = config.policy.kind in ("auto", "consistency") and _takes_guidance(config)
    return 2 if is_guided and not is_told else 1


def _takes_guidance(config: Config) -> bool:
    from rlcm_fast.backbones.loading import resolve_model

    unet = json.loads((Path(resolve_model(config.model).pipeline) / "unet" / "config.json").read_text())
    return unet.get("time_cond_proj_dim") is not None
