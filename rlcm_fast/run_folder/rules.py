"""What a changed setting means for a run that resumes: for every field of a config, one of four.

    effect    it takes effect, and is said in one line
    handled   it takes effect, what it makes void is dropped, and both are said
    refused   the run ends with the reason and the way out, before any weights load
    silent    it changes nothing about training, and nothing is said

`python -m rlcm_fast.run_folder.rules` prints the table of docs/resume.md. A new field of a config needs a row here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from typing import Any, Literal

from rlcm_fast.config import Config
from rlcm_fast.config.marks import types_of
from rlcm_fast.run_folder.fingerprint import changed_files, item_class, rule_name

Fingerprint = Mapping[str, Any]
Kind = Literal["effect", "handled", "refused", "silent"]

ABSENT = "absent"
_WEIGHTS_ONLY = "start a new run from its weights alone: --resume_weights_only {checkpoint}"
_EXPORT = "start a new run from an export of it as model.path, which has the adapters merged in"


@dataclass(frozen=True)
class Rule:
    """What happens if a field differs between a checkpoint and the config that resumes it."""

    kind: Kind
    text: str = ""  # handled: what is dropped; refused: why
    unless: Callable[[Fingerprint, Fingerprint], bool] | None = None  # refused: then the change takes effect after all
    exception: str = ""  # `unless` in words
    way_out: str = _WEIGHTS_ONLY
    voids: Literal["", "buffers", "pairs", "guard"] = ""  # handled: the part of the state that is dropped as a whole


@dataclass(frozen=True)
class Change:
    """A field that differs, with its rule as it applies to these two configs."""

    field: str
    old: Any
    new: Any
    rule: Rule

    def line(self) -> str:
        """Returns what the user is told about a change that is not refused."""
        what = f"changed since the checkpoint: {self.field} {_shown(self.old)} -> {_shown(self.new)}"
        return f"{what}; {self.rule.text}" if self.rule.kind == "handled" else what

    def refusal(self, checkpoint: str) -> str:
        """Returns the message that ends the run."""
        keep = f"keep {self.field}={_shown(self.old)}"
        way_out = self.rule.way_out.format(checkpoint=checkpoint)
        return (
            f"{self.field}={_shown(self.new)} does not go with the checkpoint's {_shown(self.old)}: {self.rule.text}; "
            f"{keep}, or {way_out}"
        )


def changes(before: Fingerprint, now: Fingerprint) -> list[Change]:
    """Lists the fields that differ between two fingerprints, in the order of the config."""
    old, new = before["fields"], now["fields"]
    found = []
    for name in [*new, *(name for name in old if name not in new)]:
        values = _value(name, old, new), _value(name, new, old)
        rule = RULES.get(rule_name(name), Rule("effect"))
        if values[0] == values[1] or rule.kind == "silent":
            continue
        if rule.kind == "refused" and rule.unless is not None and rule.unless(before, now):
            rule = Rule("effect")
        field = name.removesuffix(".name") if ABSENT in values else name
        found.append(Change(field, *values, rule))
    return found


def _value(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> Any:
    """Returns the value of a field in `one`; of an item of a list that is missing there, its name tells so.

    A field that an older version did not have is at its default, which is how that version behaved.
    """
    if name in one:
        return one[name]
    for item in _items_of(name):
        if f"{item}.name" not in one:
            return ABSENT if name == f"{item}.name" else other[name]
    return DEFAULTS.get(rule_name(name), ABSENT)


def _items_of(name: str) -> list[str]:
    """Returns the items of lists that a field belongs to: tasks[a] and tasks[a].rewards[b] for its weight."""
    parts = name.split("]")
    return ["]".join(parts[: count + 1]) + "]" for count in range(len(parts) - 1)]


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)


# What fields with the same fate share.
_MODEL = "weights go on from the model that they were trained in"
_KIND = "a network samples as the kind of model that it was trained as"
_ADAPTERS = "adapters fit only the layers, the rank and the scale that they were trained with"
_STATES = "the optimizer's states in the checkpoint are of another kind"
_BLOCKS = "8-bit states lie in blocks, which another stage would cut"
_IMAGES = "images change at once, so the advantage buffers are emptied"
_REWARDS = "the advantage buffers of its task are emptied"
_PROMPTS = "the prompts of its task begin their first pass anew"
_TASK = "a new task begins with its first prompt and empty buffers, a task that is gone is dropped"


def _has_same_files(before: Fingerprint, now: Fingerprint) -> bool:
    """Tells whether the models consist of the same files, times included, or of the same commit of the hub."""
    known, present = before.get("model"), now.get("model")
    if not known or not present or changed_files(known, present) != ([], []):
        return False
    commits = [files["commit"]["id"] for files in (*known.values(), *present.values()) if "commit" in files]
    return None not in commits


def _is_named_default(before: Fingerprint, now: Fingerprint) -> bool:
    """Tells whether the kind changes between auto and consistency, which was the default of earlier versions."""
    return {before["fields"]["policy.kind"], now["fields"]["policy.kind"]} == {"auto", "consistency"}


def _has_no_adapters(before: Fingerprint, now: Fingerprint) -> bool:
    return before["fields"]["lora.rank"] == now["fields"]["lora.rank"] == 0


def _is_torchs_adam(before: Fingerprint, now: Fingerprint) -> bool:
    names = {before["fields"]["optimizer.name"], now["fields"]["optimizer.name"]}
    return names <= {"adam", "adamw"}


def _has_states_in_no_blocks(before: Fingerprint, now: Fingerprint) -> bool:
    """Tells whether each state is a number of one weight: then the stages of ZeRO may cut them as they like.

    Stages 1 and 2 cut in the same way, so between them blocks do not matter.
    """
    stages = {before["fields"]["engine.zero_stage"], now["fields"]["engine.zero_stage"]}
    return _is_torchs_adam(before, now) or stages <= {1, 2}


def _keeps_an_average(before: Fingerprint, now: Fingerprint) -> bool:
    return before["fields"]["ema.decay"] > 0 or now["fields"]["ema.decay"] == 0


_EFFECT, _SILENT = Rule("effect"), Rule("silent")
_SAME_MODEL = Rule("refused", _MODEL, _has_same_files, "the files are the same, or the hub's commit")
_SAME_ADAPTERS = Rule("refused", _ADAPTERS, _has_no_adapters, "`lora.rank` is 0 in both", way_out=_EXPORT)
_NEW_IMAGES = Rule("handled", _IMAGES, voids="buffers")
_OTHER_LOOK = Rule("handled", "a guard learns its bands anew", voids="guard")
_NEW_REWARDS, _NEW_PROMPTS, _NEW_TASKS = (Rule("handled", text) for text in (_REWARDS, _PROMPTS, _TASK))

RULES: dict[str, Rule] = {
    # The model.
    "model.path": _SAME_MODEL,
    "model.revision": _SAME_MODEL,
    "model.base": _SAME_MODEL,
    "model.lora": _SAME_MODEL,
    "model.loras": _SAME_MODEL,
    "model.vae": _NEW_IMAGES,
    "model.vae_dtype": _EFFECT,
    "model.variant": _SAME_MODEL,
    "model.prediction": Rule("refused", "a network predicts what it was trained to predict"),
    "model.clip_skip": _NEW_IMAGES,
    "model.image_size": _NEW_IMAGES,
    "model.image_sizes": _NEW_IMAGES,
    "model.hash_files": _SILENT,
    "lora.rank": Rule("refused", _ADAPTERS, way_out=_EXPORT),
    "lora.alpha": _SAME_ADAPTERS,
    "lora.targets": _SAME_ADAPTERS,
    # Drawing images.
    "policy.kind": Rule("refused", _KIND, _is_named_default, "one is `auto`, the other `consistency`"),
    "policy.num_steps": _NEW_IMAGES,
    "policy.timesteps": _NEW_IMAGES,
    "policy.guidance_scale": _NEW_IMAGES,
    "policy.eta": _NEW_IMAGES,
    "policy.last_step": _NEW_IMAGES,
    "policy.last_sigma": _NEW_IMAGES,
    "rollout.micro_batch_size": _EFFECT,
    "rollout.reward_workers": _SILENT,
    "rollout.shared_noise": _EFFECT,
    "rollout.decode_batch_size": _EFFECT,
    "rollout.max_decoded_batches": _SILENT,
    "rollout.reward_timeout": _EFFECT,
    "rollout.max_skipped": _EFFECT,
    # Prompts, rewards, tasks.
    "prompts.source": _NEW_PROMPTS,
    "prompts.num_prompts": _NEW_PROMPTS,
    "prompts.images_per_prompt": _EFFECT,
    "prompts.negative": _NEW_IMAGES,
    "prompts.long": _NEW_IMAGES,
    "prompts.max_chunks": _NEW_IMAGES,
    "rewards_combine": _NEW_REWARDS,
    "rewards[].name": _NEW_REWARDS,
    "rewards[].label": _NEW_REWARDS,
    "rewards[].weight": _NEW_REWARDS,
    "rewards[].threshold": _NEW_REWARDS,
    "rewards[].arguments": _NEW_REWARDS,
    "rewards[].group_size": _NEW_REWARDS,
    "rewards[].credit": _NEW_REWARDS,
    "rewards[].on_failure": _EFFECT,
    "rewards[].device": _EFFECT,
    "rewards[].dtype": _NEW_REWARDS,
    "rewards[].batch_size": _EFFECT,
    "rewards[].offload": _SILENT,
    "tasks[].name": _NEW_TASKS,
    "tasks[].source": _NEW_PROMPTS,
    "tasks[].rewards[].name": _NEW_REWARDS,
    "tasks[].rewards[].label": _NEW_REWARDS,
    "tasks[].rewards[].weight": _NEW_REWARDS,
    "tasks[].rewards[].threshold": _NEW_REWARDS,
    "tasks[].rewards[].arguments": _NEW_REWARDS,
    "tasks[].rewards[].group_size": _NEW_REWARDS,
    "tasks[].rewards[].credit": _NEW_REWARDS,
    "tasks[].rewards[].on_failure": _EFFECT,
    "tasks[].rewards[].device": _EFFECT,
    "tasks[].rewards[].dtype": _NEW_REWARDS,
    "tasks[].rewards[].batch_size": _EFFECT,
    "tasks[].rewards[].offload": _SILENT,
    "tasks[].share": _NEW_PROMPTS,
    "tasks[].images_per_prompt": _NEW_PROMPTS,
    "tasks[].advantages": _EFFECT,
    "tasks[].rewards_combine": _NEW_REWARDS,
    "tasks[].evaluation": _EFFECT,
    "task_schedule": _EFFECT,
    # Learning.
    "advantages.kind": _EFFECT,
    "advantages.scale": _EFFECT,
    "advantages.buffer_size": _EFFECT,
    "advantages.min_count": _EFFECT,
    "algorithm.name": _EFFECT,
    "algorithm.eta": _EFFECT,
    "algorithm.temperature": _EFFECT,
    "update.clip_range": _EFFECT,
    "update.advantage_clip": _EFFECT,
    "update.num_passes": _EFFECT,
    "update.num_updates": _EFFECT,
    "update.num_timesteps": _EFFECT,
    "update.order": _EFFECT,
    "update.micro_batch_size": _EFFECT,
    "update.old_log_probs": _EFFECT,
    "update.step_weights": _EFFECT,
    "update.max_grad_norm": _EFFECT,
    "update.rollout_lag": _EFFECT,
    "update.max_skipped_updates": _EFFECT,
    "update.kl_weight": _EFFECT,
    "update.kl_reference": _EFFECT,
    "pretraining.data": Rule("handled", "its pairs begin with the first", voids="pairs"),
    "pretraining.weight": _EFFECT,
    "pretraining.batch_size": _EFFECT,
    "pretraining.micro_batch_size": _EFFECT,
    "pretraining.caption_dropout": _EFFECT,
    "pretraining.workers": _SILENT,
    "pretraining.max_unreadable": _EFFECT,
    "optimizer.name": Rule("refused", _STATES, _is_torchs_adam, "both are `adam` or `adamw`"),
    "optimizer.lr": _EFFECT,
    "optimizer.betas": _EFFECT,
    "optimizer.eps": _EFFECT,
    "optimizer.weight_decay": _EFFECT,
    "optimizer.warmup_updates": _EFFECT,
    "optimizer.final_lr_fraction": _EFFECT,
    # The engine.
    "engine.zero_stage": Rule(
        "refused", _BLOCKS, _has_states_in_no_blocks, "both optimizers are `adam` or `adamw`, or both stages 1 or 2"
    ),
    "engine.dtype": _EFFECT,
    "engine.kernels": _EFFECT,
    "engine.offload_optimizer": _EFFECT,
    "engine.optimizer_in_backward": _EFFECT,
    "engine.recompute": _EFFECT,
    "engine.channels_last": _EFFECT,
    "engine.group_norm": _EFFECT,
    "engine.attention": _EFFECT,
    "engine.compile": _EFFECT,
    "engine.graphs": _EFFECT,
    "engine.deterministic": _EFFECT,
    "engine.offload_idle": _EFFECT,
    "engine.memory_gib": _SILENT,
    "ema.decay": Rule(
        "refused", "the checkpoint has no average to go on with", _keeps_an_average, "it was on, or is turned off"
    ),
    "ema.device": _EFFECT,
    # Measuring, saving, showing.
    "evaluation.every": _EFFECT,
    "evaluation.num_images": _OTHER_LOOK,
    "evaluation.prompts": _OTHER_LOOK,
    "evaluation.rewards[].name": _EFFECT,
    "evaluation.rewards[].label": _EFFECT,
    "evaluation.rewards[].weight": _SILENT,
    "evaluation.rewards[].threshold": _SILENT,
    "evaluation.rewards[].arguments": _EFFECT,
    "evaluation.rewards[].group_size": _EFFECT,
    "evaluation.rewards[].credit": _SILENT,
    "evaluation.rewards[].on_failure": _EFFECT,
    "evaluation.rewards[].device": _EFFECT,
    "evaluation.rewards[].dtype": _EFFECT,
    "evaluation.rewards[].batch_size": _EFFECT,
    "evaluation.rewards[].offload": _SILENT,
    "evaluation.micro_batch_size": _EFFECT,
    "evaluation.seed": _OTHER_LOOK,
    "guard.action": _EFFECT,
    "guard.watch": _EFFECT,
    "guard.acts_on": _EFFECT,
    "guard.every": _EFFECT,
    "guard.z": _EFFECT,
    "guard.floor": _EFFECT,
    "guard.floors": _EFFECT,
    "guard.max_kl": _EFFECT,
    "guard.embedding": _OTHER_LOOK,
    "checkpoint.best": Rule("handled", "the best checkpoint so far is chosen anew"),
    "checkpoint.every": _SILENT,
    "checkpoint.export": _SILENT,
    "checkpoint.keep": _SILENT,
    "tracking.tensorboard": _SILENT,
    "tracking.wandb": _SILENT,
    "tracking.grid_every": _SILENT,
    "tracking.grid_images": _SILENT,
    "tracking.evaluation_images": _SILENT,
    "tracking.report": _SILENT,
    "tracking.live": _SILENT,
    "tracking.task_gradients_every": _SILENT,
    "tracking.reward_gradients_every": _SILENT,
    "tracking.plan": _SILENT,
    # The run.
    "run_dir": _SILENT,
    "num_iterations": _EFFECT,  # resume.py refuses fewer than are finished
    "seed": Rule("handled", "noise changes, and prompts and real images begin their first pass anew", voids="pairs"),
    "resume": _SILENT,
    "resume_weights_only": _SILENT,
    "trust_old_checkpoint": _SILENT,
    "dry_run": _SILENT,
    "profile": _SILENT,
    "debug": _SILENT,
}
SILENT = frozenset(name for name, rule in RULES.items() if rule.kind == "silent")


def every_field(section: type = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the rule's name and the default of every field of a config; MISSING if it has none."""
    hints = types_of(section)
    for field in fields(section):
        name, item = f"{prefix}{field.name}", item_class(hints[field.name])
        if is_dataclass(hints[field.name]):
            yield from every_field(hints[field.name], f"{name}.")
        elif item is not None:
            yield from every_field(item, f"{name}[].")
        else:
            yield name, field.default if field.default_factory is MISSING else field.default_factory()


DEFAULTS = {
    name: list(default) if isinstance(default, tuple) else default
    for name, default in every_field()
    if default is not MISSING
}
DEFAULTS |= {"engine.attention": "sdpa", "engine.compile": "off"}  # of the versions that did not have it


def table() -> str:
    """Returns the rules as a table of Markdown, fields with the same fate together."""
    rows: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        rows.setdefault(_in_words(rule), []).append(f"`{name}`")
    lines = [f"| {fate} | {', '.join(names)} |" for fate, names in sorted(rows.items())]
    return "\n".join(["| a change | fields |", "|---|---|", *lines])


def _in_words(rule: Rule) -> str:
    if rule.kind == "effect":
        return "takes effect"
    if rule.kind == "silent":
        return "is not mentioned"
    if rule.kind == "handled":
        return f"takes effect: {rule.text}"
    exception = f", unless {rule.exception}" if rule.exception else ""
    return f"**refused**{exception}: {rule.text}"


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
