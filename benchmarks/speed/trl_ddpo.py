"""trl's DDPOTrainer (the extra `trl`) as one more loop to measure: DDPO on a diffusion model, 50 steps and guidance.

It does other work for a sample than RLCM does: that is what a consistency model saves. All settings are trl's defaults
(50 DDIM steps, guidance 5 in sampling and training, batches of 1, an optimizer step a batch), but:
 1. float32 and the whole UNet, as the loops beside it (trl: fp16, which CPUs lack, and LoRA);
 2. the number of samples of an epoch, trl's word for an iteration, and where asked for the batch size, of sampling and
    training alike.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlcm_fast.backbones.loading import resolve_model_path
from rlcm_fast.rewards import Reward
from rlcm_fast.trajectory import Prompt


@dataclass(frozen=True)
class Batches:
    """How much an epoch does."""

    num_samples: int
    batch_size: int
    num_steps: int  # of the sampler


def reason_missing() -> str | None:
    """Why trl's trainer cannot be imported here, as where the extra is not installed; None where it can be."""
    try:
        from trl import DDPOTrainer  # noqa: F401 # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return None


def ddpo_epoch(
    model: str, prompts: Sequence[Prompt], rewards: Sequence[tuple[Reward, float]], batches: Batches
) -> Callable[[], None]:
    """A function that runs one epoch: sampling, rewards, updates.

    Raises:
        ValueError: the batch size does not divide the samples.
    """
    if batches.num_samples % batches.batch_size:
        raise ValueError(f"trl_samples={batches.num_samples} must divide by trl_batch_sizes={batches.batch_size}")
    from accelerate import PartialState
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline  # pyright: ignore[reportMissingImports]

    # Make trl's trainer, silently.
    PartialState()  # DDPOTrainer logs before it makes an accelerator, which accelerate's logger refuses
    config = DDPOConfig(
        mixed_precision="no",
        sample_num_steps=batches.num_steps,
        sample_batch_size=batches.batch_size,
        sample_num_batches_per_epoch=batches.num_samples // batches.batch_size,
        train_batch_size=batches.batch_size,
    )
    texts = itertools.cycle(prompt.text for prompt in prompts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        pipeline = DefaultDDPOStableDiffusionPipeline(resolve_model_path(model), use_lora=False)
        trainer = DDPOTrainer(config, _scored_by(rewards), lambda: (next(texts), {}), pipeline)
    pipeline.sd_pipeline.set_progress_bar_config(disable=True)

    # An epoch of it.
    def epoch() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.step(0, 0)  # epoch 0: later ones save a checkpoint

    return epoch


def _scored_by(rewards: Sequence[tuple[Reward, float]]) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    def score(images: Tensor, texts: Sequence[str], _: Any) -> tuple[Tensor, dict[str, Any]]:
        prompts = [Prompt(text) for text in texts]
        total = torch.stack([weight * reward(images.float(), prompts) for reward, weight in rewards]).sum(dim=0)
        return total, {}

    return score
