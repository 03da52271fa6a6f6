"""Reads what a run's folder has noted in place of `auto` when it began: sizes of micro-batches, fields of `engine`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import AUTO, Batches, batches_of, compile_modes, has_auto, with_batches
from rlcm_fast.config.engine_checks import attention_problem


def noted(config: Config) -> Config:
    """Returns the config with the numbers that its run's folder has noted; as it is, if there are none."""
    batches = noted_batches(config, Path(config.run_dir)) if has_auto(config) else None
    return config if batches is None else with_batches(config, batches)


def noted_batches(config: Config, folder: Path) -> Batches | None:
    """Reads the numbers in place of this config's `auto` off the config.yaml of a run."""
    run = _config_of(folder)
    if run is None:
        return None
    before, now = batches_of(run), batches_of(config)
    names = ("update", "rollout", "decode")
    kept = {name: getattr(before if getattr(now, name) == AUTO else now, name) for name in names}
    return None if AUTO in kept.values() else Batches(**kept)


def noted_engine(config: Config, folder: Path) -> dict[str, Any]:
    """Reads the fields of `engine` that a run keeps off its config.yaml, if this config allows their values."""
    run = _config_of(folder)
    if run is None:
        return {}
    kept, mode, kind = {}, run.engine.compile, run.engine.attention
    if mode in (*compile_modes(config.engine), "off"):
        kept["compile"] = mode
    if kind == "sdpa" or not (config.engine.deterministic or attention_problem(config.engine, kind)):
        kept["attention"] = kind
    return kept


def _config_of(folder: Path) -> Config | None:
    """Reads the config.yaml of a run; None if there is none, or one of a version with other fields."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        return parse_config(["--config", str(file)])
    except ValueError:  # the checkpoint's own rules judge it
        return None
