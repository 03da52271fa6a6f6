"""Reads the sizes of micro-batches that a run's folder has noted: what `auto` became when the run began."""

from __future__ import annotations

from pathlib import Path

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import AUTO, Batches, batches_of, has_auto, with_batches


def noted(config: Config) -> Config:
    """Returns the config with the numbers that its run's folder has noted; as it is, if there are none."""
    batches = noted_batches(config, Path(config.run_dir)) if has_auto(config) else None
    return config if batches is None else with_batches(config, batches)


def noted_batches(config: Config, folder: Path) -> Batches | None:
    """Reads the numbers in place of this config's `auto` off the config.yaml of a run."""
    file = folder / "config.yaml"
    if not file.is_file():
        return None
    try:
        before = batches_of(parse_config(["--config", str(file)]))
    except ValueError:  # of a version with other fields; the checkpoint's own rules judge those
        return None
    now = batches_of(config)
    names = ("update", "rollout", "decode")
    kept = {name: getattr(before if getattr(now, name) == AUTO else now, name) for name in names}
    return None if AUTO in kept.values() else Batches(**kept)
