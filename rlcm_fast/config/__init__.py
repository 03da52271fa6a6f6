"""The configuration: typed sections, read from defaults < YAML files < command line, and what follows from them.

    parse_config(argv)            -> Config        parser.py reads, mistakes.py words errors, files.py finds files
    validate(config, world_size)  -> ResolvedRun   checks.py: ranges first, then what fields ask of each other
    resolve(config, world_size)   -> ResolvedRun   resolved.py: tasks, rounds and sizes, without the checks

To add a field, write it in sections.py, reward_sections.py or guard.py with its type, choices, range, default and
docstring. This room is light on purpose: it imports neither torch nor diffusers, so it reports a mistake in under a
second, before any weights load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import yaml
from jsonargparse import ArgumentParser

from rlcm_fast.config.files import RESOLVED
from rlcm_fast.config.guard import GuardConfig
from rlcm_fast.config.mistakes import fields_of, options_of
from rlcm_fast.config.parser import parse, parser_of
from rlcm_fast.config.ranges import Seed, Updates, UpdatesOrZero
from rlcm_fast.config.reward_sections import RewardConfig, TaskConfig
from rlcm_fast.config.sections import (
    AdvantagesConfig,
    AlgorithmConfig,
    CheckpointConfig,
    EmaConfig,
    EngineConfig,
    EvaluationConfig,
    LoraConfig,
    LoraSource,
    ModelConfig,
    OptimizerConfig,
    PolicyConfig,
    PretrainingConfig,
    PromptsConfig,
    RolloutConfig,
    TrackingConfig,
    UpdateConfig,
)

__all__ = [
    "AdvantagesConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "EmaConfig",
    "EngineConfig",
    "EvaluationConfig",
    "GuardConfig",
    "LoraConfig",
    "LoraSource",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyConfig",
    "PretrainingConfig",
    "PromptsConfig",
    "RewardConfig",
    "RolloutConfig",
    "TaskConfig",
    "TrackingConfig",
    "UpdateConfig",
    "build_parser",
    "config_of",
    "parse_config",
    "to_dict",
    "to_yaml",
]


@dataclass(frozen=True)
class Config:
    """The run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """what is fine-tuned"""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """adapters to train instead of all weights"""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """the sampler that is trained"""
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    """where prompts come from, and how many an iteration draws"""
    rewards: list[RewardConfig] = field(default_factory=lambda: [RewardConfig("jpeg_compressibility")])
    """The rewards: a YAML list of {name: NAME, weight: 1.0, arguments: {}, group_size: 0, credit: group, ...}."""
    rewards_combine: Literal["sum", "normalised", "lexicographic"] = "sum"
    """sum: weighted; normalised: standardise each reward first (GDPO); lexicographic: and in order (threshold)."""
    tasks: list[TaskConfig] = field(default_factory=list)
    """Tasks that replace prompts.source and rewards: a list of {name: NAME, source: SOURCE, rewards: [...]}."""
    task_schedule: Literal["mixed", "by_task"] = "mixed"
    """mixed: one rollout and its updates for all tasks; by_task: a rollout and updates for one task after another."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """how images are drawn and scored"""
    advantages: AdvantagesConfig = field(default_factory=AdvantagesConfig)
    """how rewards become advantages"""
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    """what an update does with advantages"""
    update: UpdateConfig = field(default_factory=UpdateConfig)
    """the optimizer steps on a rollout"""
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    """a loss on real images beside the rewards"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer and its learning rate"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """where weights, gradients and states live, and how the network runs"""
    ema: EmaConfig = field(default_factory=EmaConfig)
    """a moving average of the weights"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """held-out images at fixed seeds"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """what tells that a reward is being hacked"""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """what a run resumes from"""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    """what the run writes for people to look at"""
    run_dir: str = "runs/default"
    """Folder of the run: config, metrics, grids, checkpoints, export."""
    num_iterations: Updates = 100
    """Number of iterations; each is one rollout and the updates on it."""
    seed: Seed = 0
    """Seed of everything random; each process derives its random numbers from it."""
    resume: str | None = None
    """Continue from a checkpoint: latest (the newest in run_dir) or its folder; null starts a new run."""
    trust_old_checkpoint: bool = False
    """Resume from a checkpoint of format 1 (no `format` in state.json): pickles, so any code in its files runs."""
    resume_weights_only: str | None = None
    """Start a new run from the trained weights alone of a checkpoint, or of the newest one in the folder of a run."""
    dry_run: bool = False
    """Print the resolved config and the derived numbers, and stop."""
    profile: UpdatesOrZero = 0
    """Profile this iteration, counted from 1 over the whole run: a trace and a table of stages in run_dir/profile."""
    debug: bool = False
    """Show the warnings and advice of the libraries, too; without it the run's own lines come first."""

    @property
    def has_start_model(self) -> bool:
        """Tells whether updates may need the start model: for the KL term, or for a guard that may raise its weight."""
        return self.update.kl_weight > 0 or self.guard.raises_kl


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as plain YAML types, in the order of its fields."""
    return _plain(asdict(config))


def to_yaml(config: Config) -> str:
    """Returns the config as a YAML file; `--config` reads it back to an equal config."""
    return f"{RESOLVED}\n{yaml.safe_dump(to_dict(config), sort_keys=False)}"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def parse_config(argv: Sequence[str]) -> Config:
    """Returns the config of a command line; raises ValueError with one line: the field, its value, the way out."""
    return parse(argv, Config)


def config_of(file: str | None, overrides: Mapping[str, Any]) -> Config:
    """Returns the config of a YAML file, or of the defaults, under keywords written section__field.

    It is the config of the same command line; raises ValueError with one line as `parse_config` does.
    """
    files = [] if file is None else [f"--config={file}"]
    return parse_config([*files, *options_of(overrides, Config)])


def field_names() -> list[str]:
    """Returns the dotted names of all fields."""
    return list(dict(fields_of(Config)))


def build_parser() -> ArgumentParser:
    """Returns the parser behind `--help`."""
    return parser_of(Config)
