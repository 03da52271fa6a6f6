"""The names of TRL 0.23's DDPO, which TRL removed: a script written for it runs with one import changed.

    from rlcm_fast.compat import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    config.py    DDPOConfig with TRL's fields and defaults
    fields.py    what each field is here, or why it is refused
    pipeline.py  DefaultDDPOStableDiffusionPipeline
    samples.py   the script's prompt function, reward function and hook, as a run calls them
    trainer.py   DDPOTrainer

The loop, the checks and the run folder are rlcm_fast's. Departures from TRL's training, DDPO (arXiv 2305.13301):
 1. The last denoising step is deterministic and no action: S steps are S - 1 actions. TRL draws the image with a noise
    of 0.02 at this step (Stable Diffusion's betas, 50 steps) and trains on it.
 2. An update has as many transitions as TRL's, but shuffled over samples and steps; TRL's consists of all steps of
    train_batch_size * train_gradient_accumulation_steps samples.
 3. Guidance is the same in sampling and in training; train_cfg=False is accepted without guidance only.
 4. States and log-probs are float32 throughout. mixed_precision="fp16" trains in bf16, which needs no loss scaling.
 5. Advantages per batch divide by sqrt(var + 1e-6), where TRL divides by std + 1e-8, and are computed in float64.
 6. Adapters begin with PEFT's default, where TRL begins with Gaussian numbers; both begin at the model itself.
 7. Noise comes from (seed, place) and not from torch's global state, so images differ from TRL's for the same seed;
    `random` and numpy are seeded as TRL seeds them, so a prompt function draws the same prompts.
 8. The hook is called when the epoch is over, not before its updates, with the step that the epoch began with.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcm_fast.compat.config import DDPOConfig
    from rlcm_fast.compat.pipeline import DefaultDDPOStableDiffusionPipeline
    from rlcm_fast.compat.trainer import DDPOTrainer

_PLACES = {
    "DDPOConfig": "config",
    "DDPOTrainer": "trainer",
    "DefaultDDPOStableDiffusionPipeline": "pipeline",
}
__all__ = ["DDPOConfig", "DDPOTrainer", "DefaultDDPOStableDiffusionPipeline"]


def __getattr__(name: str) -> object:
    """Imports a name when it is first used, so that a mistake in a DDPOConfig is found before torch is imported."""
    if name not in _PLACES:
        raise AttributeError(f"module 'rlcm_fast.compat' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"rlcm_fast.compat.{_PLACES[name]}"), name)
