"""The model card of an export: README.md with the YAML head that the hub reads, curves, samples before and after."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import Config, RewardConfig, to_dict
from rlcm_fast.config.files import local_path
from rlcm_fast.config.resolved import resolve
from rlcm_fast.policies import resolve_kind
from rlcm_fast.report.measures import WIN_RATE
from rlcm_fast.report.reading import flat, lines_of
from rlcm_fast.report.rewards import of_person

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SHIPPED = ("shapes/lcm", "shapes/teacher")
_FEWEST_POINTS = 5  # of a curve that says something
_SAMPLERS = {"consistency": "LCM", "ddim": "DDIM", "euler_ancestral": "Euler ancestral", "tcd": "TCD"}
_SCHEDULERS = {  # of diffusers
    "consistency": "LCMScheduler",
    "ddim": "DDIMScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "tcd": "TCDScheduler",
}
_TAKE_TIMESTEPS = ("consistency", "tcd")  # those whose scheduler of diffusers takes named timesteps
_LIMITS = (
    "Training on a reward moves a model towards what the reward measures, not towards what people want: look at the"
    " samples, and at a reward that was not trained on. The limits and the biases of the base model remain."
)


@dataclass(frozen=True)
class Card:
    """What a card says of an export."""

    run_dir: Path
    config: Config
    iteration: int
    usage: str  # how to load it, a line or a block of code
    notes: Sequence[str] = ()  # what was lost or changed on the way
    is_adapter: bool = False  # it is a LoRA, to be used with a base model

    def write(self, folder: Path) -> None:
        """Writes README.md, curves.png and the pictures before.png and after.png, as far as the run has them."""
        pictures = self._curves(folder) + _samples(self.run_dir, folder, self.iteration)
        parts = [f"# {self.run_dir.name}", self._summary(), self.usage, self._recipe(), *self.notes, *pictures]
        parts += ["## Limits and licences", _LIMITS, self._licences()]
        text = f"---\n{yaml.safe_dump(self._head(), sort_keys=False)}---\n\n" + "\n\n".join(parts) + "\n"
        (folder / "README.md").write_text(text, encoding="utf-8")

    def _head(self) -> dict[str, Any]:
        model = self.config.model
        bases = [path for path in (model.path, model.base, model.lora) if path is not None]
        ids = [path for path in bases if _HUB_ID.fullmatch(path) and path not in _SHIPPED and not Path(path).exists()]
        licence = {"license": "other", "license_name": "that-of-the-base-model"}
        if model.path in _SHIPPED and not ids:
            licence = {"license": "apache-2.0"}
        head: dict[str, Any] = {
            "library_name": "diffusers",
            "pipeline_tag": "text-to-image",
            **licence,
            "tags": ["text-to-image", "reinforcement-learning", "rlcm_fast", *(["lora"] if self.is_adapter else [])],
        }
        return {**head, "base_model": ids} if ids else head

    @property
    def _rewards(self) -> list[RewardConfig]:
        tasks = resolve(self.config, 1).tasks
        return [reward for task in tasks for reward in task.rewards]

    def _summary(self) -> str:
        rewards = ", ".join(f"{reward.key} ({reward.weight:g})" for reward in self._rewards)
        return (
            f"`{shown(self.config.model.path)}`, fine-tuned with reinforcement learning by rlcm_fast {_version()} on"
            f" the rewards (and weights) {rewards}, for {self.iteration} iterations."
        )

    def _recipe(self) -> str:
        config, policy = self.config, self.config.policy
        trained = (
            f"LoRA of rank {config.lora.rank}, alpha {config.lora.alpha:g}"
            if config.lora.rank > 0
            else "the whole UNet"
        )
        sizes = resolve(config, 1).sizes
        rows = {
            "base model": shown(config.model.path),
            "LoRAs in the base": _loras(config),
            "trained": trained,
            "sampler": f"{policy.kind}, {policy.num_steps} steps, guidance {policy.guidance_scale:g}",
            "timesteps": " ".join(map(str, policy.timesteps)) or None,
            "clip skip (that of A1111 is one more)": config.model.clip_skip,
            "negative prompt": config.prompts.negative or None,
            "long prompts": _long_prompts(config),
            "prompts": ", ".join(shown(task.source) for task in resolve(config, 1).tasks),
            "images per iteration": sizes.samples_per_iteration,
            "algorithm": config.algorithm.name,
            "learning rate": f"{config.optimizer.lr:g} ({config.optimizer.name})",
            "KL to the start model": config.update.kl_weight or None,
        }
        lines = [f"| {name} | {value} |" for name, value in rows.items() if value is not None]
        return "\n".join(["## Recipe", "", "| setting | value |", "|---|---|", *lines])

    def _curves(self, folder: Path) -> list[str]:
        """Draws the rewards over the card's iterations, and in the place of a person's reward its win rate."""
        # Read their values.
        lines = [line for line in lines_of(self.run_dir / "metrics.jsonl", []) if line["iteration"] < self.iteration]
        means = sorted({key for line in lines for key in line if key.startswith("reward/") and key.endswith("/mean")})
        named = {key: key.removeprefix("reward/").removesuffix("/mean") for key in means}
        left_out = of_person(flat(to_dict(self.config)))
        shown = {key: name for key, name in named.items() if name not in left_out}
        shown |= {WIN_RATE: "win rate"} if any(WIN_RATE in line for line in lines) else {}
        if not shown or len(lines) < _FEWEST_POINTS:
            return []

        # Draw them without a display and without pyplot's global state.
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 2.2 * len(shown)), layout="constrained")
        for axes, (key, name) in zip(figure.subplots(len(shown), squeeze=False)[:, 0], shown.items(), strict=True):
            points = [(line["iteration"], line[key]) for line in lines if key in line]
            axes.plot([x for x, _ in points], [y for _, y in points])
            axes.set_ylabel(name)
        axes.set_xlabel("iteration")
        figure.savefig(folder / "curves.png", dpi=80)
        return ["![Rewards over the iterations](curves.png)"]

    def _licences(self) -> str:
        """Says whose licences bind the result; those of reward models are known to us."""
        base = self.config.model.path
        lines = [f"- base model: the licence of `{shown(base)}` binds this model, too"]
        if base in _SHIPPED:
            lines = [f"- base model: `{base}` comes with rlcm_fast, under the Apache License 2.0"]
        for reward in self._rewards:
            for weights in _weights_of(reward.name):
                lines.append(f"- reward {reward.name}: {weights.source or 'a file of yours'}, {weights.licence}")
        return "\n".join(lines)


def diffusers_usage(config: Config, place: str, scheduler: str) -> str:
    """Returns the code that loads a folder of diffusers, or a repository of the hub, and draws as the run did.

    scheduler: the class that the folder names.
    """
    # Load it; the class that was trained may be another than the folder's.
    policy, wanted = config.policy, _SCHEDULERS[config.policy.kind]
    imported = ["DiffusionPipeline", *([wanted] if scheduler != wanted else [])]
    lines = [f"from diffusers import {', '.join(sorted(imported))}", ""]
    lines.append(f'pipeline = DiffusionPipeline.from_pretrained("{place}")')
    if scheduler != wanted:
        lines.append(f"pipeline.scheduler = {wanted}.from_config(pipeline.scheduler.config)")

    # Draw.
    takes_them = policy.timesteps and policy.kind in _TAKE_TIMESTEPS
    steps = f"timesteps={policy.timesteps}" if takes_them else f"num_inference_steps={policy.num_steps}"
    eta = f", eta={policy.eta:g}" if policy.kind in ("ddim", "tcd") else ""
    lines.append(f'image = pipeline("...", {steps}, guidance_scale={policy.guidance_scale:g}{eta}).images[0]')
    code = "\n".join(["```python", *lines, "```"])
    if policy.timesteps and not takes_them:
        code += f"\n\n{wanted} takes no named timesteps: `rlcm-fast sample --model {place}` draws at those of the run."
    return f"{code}\n\n{sampler(config)}"


def lora_usage(config: Config) -> str:
    """Says where a LoRA goes."""
    base = shown(config.model.path)
    return (
        "`kohya.safetensors` goes into ComfyUI's or A1111's folder of LoRAs, or into `pipeline.load_lora_weights` of"
        f" diffusers, and is applied at strength 1 to `{base}`. {sampler(config)}"
    )


def shown(path: str) -> str:
    """Returns what a card calls a file or folder; where it lies on this machine is nobody's business."""
    return Path(path).name if local_path(path).is_absolute() else path


def sampler(config: Config) -> str:
    """Says with which sampler the model was trained."""
    policy = config.policy
    eta = f" (eta {policy.eta:g})" if policy.kind in ("ddim", "tcd") else ""
    timesteps = f" at the timesteps {', '.join(map(str, policy.timesteps))}" if policy.timesteps else ""
    return f"Sampler: {_SAMPLERS[policy.kind]}{eta}, {policy.num_steps} steps{timesteps}."


def with_kind(config: Config, backbone: Backbone) -> Config:
    """Returns the config with the kind of policy that policy.kind=auto stands for; a card names it."""
    kind = resolve_kind(config.policy, backbone.unet.config, backbone.scheduler_config)
    return replace(config, policy=replace(config.policy, kind=kind))


def _loras(config: Config) -> str | None:
    """Names the LoRAs that were fused into the base model, with their scales."""
    model = config.model
    named = [shown(model.lora)] if model.lora else []
    named += [f"{shown(lora.path)} ({lora.scale:g})" for lora in model.loras]
    return ", ".join(named) or None


def _long_prompts(config: Config) -> str | None:
    """Says how prompts over 75 tokens were read; None if they were cut, as usual."""
    return f"{config.prompts.num_chunks} chunks of 75 tokens" if config.prompts.long == "chunks" else None


def _weights_of(name: str) -> Sequence[Any]:
    """Returns what is known of the models that a reward computes on; nothing for rewards without."""
    from rlcm_fast.plugins import load_class
    from rlcm_fast.rewards import BUILT_IN

    facts = getattr(load_class(name, BUILT_IN), "FACTS", None) if name in BUILT_IN else None  # your class may have none
    return () if facts is None else facts.weights


def _version() -> str:
    try:
        return metadata.version("rlcm_fast")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return "(a checkout)"


def _samples(run_dir: Path, folder: Path, iteration: int) -> list[str]:
    """Copies the run's first grid and its last one up to `iteration`."""
    grids = [grid for grid in sorted((run_dir / "grids").glob("*.png")) if grid.stem.isdecimal()]
    grids = [grid for grid in grids if int(grid.stem) <= iteration]
    if len(grids) < 2:
        return []
    shutil.copy(grids[0], folder / "before.png")
    shutil.copy(grids[-1], folder / "after.png")
    before, after = int(grids[0].stem), int(grids[-1].stem)
    return [f"Before ({before} iterations):", "![](before.png)", f"After {after}, same noise:", "![](after.png)"]
