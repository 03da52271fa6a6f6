"""The cells of matrix.py: all combinations, the run that each stands for, and who is refused."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from rlcm_fast.config import (
    AdvantagesConfig,
    CheckpointConfig,
    Config,
    EngineConfig,
    EvaluationConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptsConfig,
    RewardConfig,
    TrackingConfig,
    UpdateConfig,
)
from rlcm_fast.config.checks import validate

AXES: dict[str, tuple[Any, ...]] = {
    "trained": ("all weights", "adapters"),
    "optimizer": ("adamw", "adam", "adamw_8bit", "bnb_adamw_8bit", "bnb_paged_adamw_8bit"),
    "zero_stage": (0, 1, 2, 3),
    "dtype": ("fp32", "bf16", "pure_bf16"),
    "offload": (False, True),
    "in_backward": (False, True),
    "processes": (1, 2),
}


@dataclass(frozen=True)
class Cell:
    """One combination; the fields are those of AXES."""

    trained: str
    optimizer: Any
    zero_stage: Any
    dtype: Any
    offload: bool
    in_backward: bool
    processes: int


def all_cells() -> list[Cell]:
    return [Cell(*values) for values in itertools.product(*AXES.values())]


def config_of(cell: Cell, model: str = "", folder: str = "run") -> Config:
    """Two iterations of one update; a large eps keeps Adam from blowing up the rounding of gradients near zero."""
    # 2 prompts, 2 images of each, 2 actions; optimizer_in_backward allows one backward pass an update.
    transitions = 8 // cell.processes
    micro_batch_size = transitions if cell.in_backward else transitions // 2
    return Config(
        model=ModelConfig(path=model),
        lora=LoraConfig(rank=2 if cell.trained == "adapters" else 0),
        policy=PolicyConfig(num_steps=3),
        prompts=PromptsConfig(num_prompts=2, images_per_prompt=2),
        rewards=[RewardConfig("jpeg_compressibility")],
        advantages=AdvantagesConfig(kind="batch"),
        update=UpdateConfig(micro_batch_size=micro_batch_size, kl_weight=0.1),
        # What the cell is about.
        optimizer=OptimizerConfig(
            name=cell.optimizer,
            lr=1e-2,
            eps=1e-5,
            weight_decay=0.0 if cell.optimizer == "adam" else 0.1,
            final_lr_fraction=0.5,
        ),
        engine=EngineConfig(
            zero_stage=cell.zero_stage,
            dtype=cell.dtype,
            offload_optimizer=cell.offload,
            optimizer_in_backward=cell.in_backward,
        ),
        # A checkpoint after each iteration, to resume from.
        evaluation=EvaluationConfig(every=0),
        checkpoint=CheckpointConfig(every=1),
        tracking=TrackingConfig(tensorboard=False, grid_every=0),
        run_dir=folder,
        num_iterations=2,
    )


def refusal(cell: Cell) -> str:
    """What a user is told; empty where the cell is accepted."""
    try:
        validate(config_of(cell), cell.processes)
    except ValueError as error:
        return str(error)
    return ""
