"""The strategies whose memory bench_memory.py measures: configs that ship, with overrides."""

from __future__ import annotations

from dataclasses import dataclass

PROMPTS_PER_ITERATION = 1


@dataclass(frozen=True)
class Case:
    """A name for the table, a config file, and overrides as "field=value"."""

    name: str
    config: str
    overrides: tuple[str, ...]

    def options(self) -> list[str]:
        """The options of train.py."""
        return [f"--{override}" for override in self.overrides]


def _cases(prefix: str, config: str, sizes: str, strategies: dict[str, str]) -> list[Case]:
    """Space-separated overrides; a strategy's come after those of the sizes and may replace them."""
    cases = []
    for name, overrides in strategies.items():
        cases.append(Case(f"{prefix} {name}", config, (*sizes.split(), *overrides.split())))
    return cases


def _sizes(micro_batch_size: int, decode_batch_size: int) -> str:
    """One rollout micro-batch of images, two actions each: two micro-batches of an update."""
    n = micro_batch_size
    return (
        f"policy.num_steps=3 prompts.num_prompts=1 prompts.images_per_prompt={n} rollout.micro_batch_size={n} "
        f"rollout.decode_batch_size={decode_batch_size} update.micro_batch_size={n} update.num_updates=1 "
        "engine.compile=off engine.offload_idle=true model.vae_dtype=fp32"
    )


_ADAMW_8BIT = "engine.dtype=fp32 optimizer.name=adamw_8bit"
_MASTER = "engine.channels_last=false engine.dtype=bf16 engine.zero_stage=1"
_BACKWARD = "engine.optimizer_in_backward=true update.num_updates=2"
_STRATEGIES = {
    "pure_bf16 adamw_8bit": "",
    "pure_bf16 adamw_8bit block": "engine.recompute=block",
    "pure_bf16 adamw_8bit selective": "engine.recompute=selective",
    "pure_bf16 adamw_8bit block in backward": f"engine.recompute=block {_BACKWARD}",
    "fp32 adamw block": "engine.dtype=fp32 optimizer.name=adamw engine.recompute=block",
    "fp32 adamw_8bit block": f"{_ADAMW_8BIT} engine.recompute=block",
    "bf16 ZeRO-1 adamw block": f"{_MASTER} optimizer.name=adamw engine.recompute=block",
    "bf16 ZeRO-1 bnb_adamw_8bit block": f"{_MASTER} optimizer.name=bnb_adamw_8bit engine.recompute=block",
    "bf16 ZeRO-2 adamw_8bit block": f"{_MASTER} engine.zero_stage=2 engine.recompute=block",
    "LoRA 16 of bf16": "lora.rank=16 optimizer.name=adamw",
    "pure_bf16 adamw_8bit block, KL": "engine.recompute=block update.kl_weight=0.1",
    "pure_bf16 adamw_8bit block, EMA": "engine.recompute=block ema.decay=0.99",
    "pure_bf16 adamw_8bit block, all on the GPU": "engine.recompute=block engine.offload_idle=false",
}
_OF_SDXL = {
    "pure_bf16 adamw_8bit block": "",
    "pure_bf16 adamw_8bit block in backward": _BACKWARD,
    "LoRA 16 of bf16, block": "lora.rank=16 optimizer.name=adamw",
    "bf16 ZeRO-1 adamw block": f"{_MASTER} optimizer.name=adamw",  # is not to fit
}


def _of_shapes(strategies: dict[str, str]) -> dict[str, str]:
    """Adds what the full-size configs set and the small ones do not."""
    base = (
        "engine.dtype=pure_bf16 optimizer.name=adamw_8bit engine.channels_last=true engine.offload_idle=true "
        "policy.last_step=deterministic"
    )
    return {name: f"{base} {overrides}" for name, overrides in strategies.items()}


CASES: dict[str, list[Case]] = {
    "full_size": [
        *_cases("SD1.5", "configs/sd15_lcm/full_24gb.yaml", _sizes(8, 4), _STRATEGIES),
        *_cases("SDXL", "configs/sdxl_lcm/full_24gb.yaml", _sizes(4, 1), _OF_SDXL),
    ],
    "shapes": _cases("shapes", "configs/shapes/compressibility_paper.yaml", _sizes(8, 0), _of_shapes(_STRATEGIES)),
}
