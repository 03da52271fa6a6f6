"""How a run drew its images, kept beside what it exports: sampler.json, which stock tools ignore.

A scheduler's config has no place for named timesteps or for guidance, and its class may be another sampler's than the
one that was trained (policy.kind: ddim on a folder with PNDM). `rlcm-fast sample` and `evaluate` read this file, or the
recipe in the header of a checkpoint in one file.
"""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import hf_hub_download

from rlcm_fast.backbones.file_kinds import is_checkpoint, read_header
from rlcm_fast.config import PolicyConfig, parse_config
from rlcm_fast.config.files import local_path

SAMPLER_FILE = "sampler.json"
RECIPE = "rlcm_fast.recipe"  # in the header of our files: a run's config
_FIELDS = ("kind", "num_steps", "timesteps", "guidance_scale", "eta", "last_step")


def write_sampler(policy: PolicyConfig, folder: Path) -> None:
    """Writes the fields of a policy that decide what it draws."""
    fields = {name: getattr(policy, name) for name in _FIELDS}
    (folder / SAMPLER_FILE).write_text(json.dumps(fields, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_sampler(model: str, revision: str | None = None) -> PolicyConfig | None:
    """Returns how a model was sampled while it was trained here; None for models of others.

    model: a folder, a .safetensors file, alone or in a folder with sampler.json, or a hub id.

    Raises:
        ValueError: the file is damaged.
    """
    place = local_path(model)
    if is_checkpoint(model):
        recipe = read_header(place, f"model={model}")[1].get(RECIPE)
        if recipe is not None:
            return _parsed(recipe, model, "policy")
        place = place.parent
    elif not place.is_dir():
        return _of_hub(model, revision)
    file = place / SAMPLER_FILE
    return _parsed(file.read_text(encoding="utf-8", errors="replace"), str(file)) if file.is_file() else None


def _of_hub(repository: str, revision: str | None) -> PolicyConfig | None:
    try:
        file = hf_hub_download(repository, SAMPLER_FILE, revision=revision)
    except (OSError, ValueError):  # it has none, or is no repository, or was loaded from the cache without a network
        return None
    return _parsed(Path(file).read_text(encoding="utf-8"), f"{repository}/{SAMPLER_FILE}")


def _parsed(text: str, named: str, section: str | None = None) -> PolicyConfig:
    """Parses the fields, or those in a section of the text, with the checks of a config."""
    try:
        found = json.loads(text)
        fields = found if section is None else found[section]
        known = {name: fields[name] for name in _FIELDS if name in fields}
        texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in known.items()}
        return parse_config([f"--policy.{name}={text}" for name, text in texts.items()]).policy
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{named} does not say how to sample ({reason}); repair it, or remove it") from error
