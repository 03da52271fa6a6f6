"""Configs, numbers and YAML."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, get_args

from malformed import Case, writes
from rlcm_fast.config import Config
from rlcm_fast.config.marks import marks_of, types_of
from rlcm_fast.config.ranges import Range

_OPTIONS = """
--seed|seed
--sed 3|did you mean --seed
--update.clip_rage 1|did you mean --update.clip_range
seed 3|belongs to no option
--seed=3 5|belongs to no option
--policy 3|--policy is no field of the config; it is a section
--model foo|--model is no field
--learning_rate 1|optimizer.lr
--optimizer.learning_rate 1|optimizer.lr
--batch_size 4|prompts.num_prompts
--gradient_accumulation_steps 4|update.micro_batch_size
--epochs 3|num_iterations
--num-train-epochs 3|num_iterations
--lora_rank 8|lora.rank
--output_dir x|run_dir
--pretrained_model_name_or_path x|model.path
--reward_fn x|rewards
--num_inference_steps 4|policy.num_steps
--mixed_precision bf16|engine.dtype
--report_to wandb|tracking.wandb
--resolution 512|model.image_size
--beta 0.1|update.kl_weight
--save_steps 5|checkpoint.every
--config|--config needs a YAML file
--config no.yaml|config=no.yaml is not a file
--config shapes/compresibility|did you mean
--config .|config=. is a folder
--config=|config= is not a file
--policy.kind ddpm|policy.kind=ddpm
--policy.kind 3|policy.kind=3
--engine.dtype fp8|engine.dtype=fp8
--engine.zero_stage 4|engine.zero_stage=4
--engine.zero_stage one|engine.zero_stage=one
--optimizer.name sgd|optimizer.name=sgd
--optimizer.betas 0.9|optimizer.betas
--optimizer.betas [0.9]|optimizer.betas
--optimizer.betas [0.9,0.99,0.999]|optimizer.betas
--optimizer.betas [a,b]|optimizer.betas
--debug=maybe|debug=maybe
--lora.targets 3|lora.targets
--lora.targets []|lora.targets
--lora.targets ['']|lora.targets
--policy.timesteps 999|policy.timesteps
--policy.timesteps [1,2]|policy.timesteps
--policy.timesteps [1500,3]|policy.timesteps
--policy.timesteps [999,-1]|policy.timesteps
--policy.num_steps 1|policy.num_steps=1
--model.image_size [8]|model.image_size
--model.image_size [8,8,8]|model.image_size
--model.image_size big|model.image_size
--model.image_sizes [8,8]|model.image_sizes
--model.image_sizes [[8]]|model.image_sizes
--model.image_sizes [[0,8]]|model.image_sizes
--model.image_sizes [[8,8],[8,8]]|model.image_sizes
--rewards []|rewards=[]
--rewards jpeg|rewards
--rewards 3|rewards
--rewards {name:a}|rewards
--rewards [jpeg]|rewards[0]
--rewards [{}]|rewards[0] lacks name
--rewards [{weight:1}]|rewards[0]
--rewards [{name:|is not YAML
--tasks [{"name":"a"}]|tasks[0] lacks source
--tasks [3]|tasks[0]=3
--task_schedule by_task|task_schedule=by_task
--profile 200|profile=200
--pretraining.weight 1|pretraining.data
--pretraining.data x|pretraining.data=x
--prompts.negative x --policy.guidance_scale 1|prompts.negative=x
--prompts.max_chunks 3|prompts.max_chunks=3
--update.num_updates 7|update.num_updates=7
--update.micro_batch_size 7|update.micro_batch_size=7
--resume no/such|resume=no/such
--resume latest --run_dir nowhere|run_dir=nowhere
--resume_weights_only no/such|resume_weights_only=no/such
--rollout.micro_batch_size automatic|rollout.micro_batch_size=automatic
"""

_PATHS = ("run_dir", "resume", "model.path", "model.vae", "model.lora", "model.base")
_NAMES = (*_PATHS, "prompts.source", "evaluation.prompts")


def configs() -> list[Case]:
    """Options: unknown, misspelt, another tool's, of the wrong type, without a value, against each other."""
    found = [_of_line(line) for line in _OPTIONS.strip().splitlines()]
    for name in _NAMES:
        found.append(Case(f"--{name} 300 letters", [f"--{name}={'x' * 300}"], f"{name}="))
        found.append(Case(f"--{name} 5,000 letters", [f"--{name}={'x/' * 2500}"], f"{name}="))
        found.append(Case(f"--{name} NUL", [f"--{name}=a\x00b"], f"{name}="))
        found.append(Case(f"--{name} two lines", [f"--{name}=a\nb"], f"{name}="))
    return found


def _of_line(line: str) -> Case:
    options, _, says = line.partition("|")
    return Case(options, options.split(), says)


def _fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, Range | None]]:
    ranges = marks_of(kind, Range)
    for name, hint in types_of(kind).items():
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _fields(hint, f"{prefix}{name}.")
        elif name in ranges:
            yield prefix + name, hint, ranges[name]


_SHAPED = {"optimizer.betas": "[{},0.9]", "model.image_sizes": "[[{},8],[8,16]]", "model.image_size": "[{},8]"}


def numbers() -> list[Case]:
    """Each number of a config: beyond its bound, far beyond it, below its range, not finite, a text, a list."""
    found = []
    for name, hint, allowed in _fields(Config):
        assert allowed is not None
        shape = _SHAPED.get(name, "{}")
        most = allowed.high if allowed.bound is None else allowed.bound.most
        is_whole = hint is int or int in get_args(hint)
        beyond = int(most) + 1 if is_whole or (name in _SHAPED and name != "optimizer.betas") else most * 1.01
        values = [beyond, "1" + "0" * 30, -7, ".nan", ".inf", "abc", "{a: 1}", "1" + "0" * 5000]
        for value in values:
            text = shape.format(value)
            found.append(Case(f"--{name} {text[:30]} ({len(text)})", [f"--{name}={text}"], name))
    for number in ("weight", "group_size", "batch_size"):
        for value in (".nan", "1e30", "-3.5e9", "abc"):
            text = f"[{{name: jpeg_compressibility, {number}: {value}}}]"
            found.append(Case(f"--rewards {number} {value}", ["--rewards", text], f"rewards[0].{number}="))
    product = ["--prompts.num_prompts=1000000", "--prompts.images_per_prompt=1000000"]
    found.append(Case("10**12 images", product, "prompts.num_prompts=1000000"))
    hang = ["--prompts.num_prompts=100000000", "--update.micro_batch_size=7", "--dry_run=true"]
    found.append(Case("the divisor that hung", hang, "prompts.num_prompts=100000000"))
    prime = ["--prompts.num_prompts=999983", "--prompts.images_per_prompt=1", "--update.micro_batch_size=64"]
    found.append(Case("a large prime", prime, "update.micro_batch_size=64"))
    return found


_BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
_YAML: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "holds no fields"),
    "a comment": ("# nothing\n", "holds no fields"),
    "a list": ("- seed: 0\n", "holds no fields"),
    "a text": ("seed\n", "holds no fields"),
    "a number": ("3\n", "holds no fields"),
    "an open list": ("seed: [\n", "is not YAML"),
    "a tab": ("policy:\n\tnum_steps: 4\n", "is not YAML"),
    "two colons": ("seed: 3: 4\n", "is not YAML"),
    "bad indentation": ("policy:\n  num_steps: 4\n kind: ddim\n", "is not YAML"),
    "two documents": ("seed: 0\n---\nseed: 1\n", "is not YAML"),
    "an unknown alias": ("seed: *x\n", "is not YAML"),
    "a Python object": ("seed: !!python/object/apply:os.system ['true']\n", "is not YAML"),
    "a month 13": ("run_dir: 2026-13-45\n", "is not YAML"),
    "an int of text": ("seed: !!int abc\n", "is not YAML"),
    "a list as key": ("[a, b]: 3\n", "is no"),
    "a mapping as key": ("{a: b}: 3\n", "is not YAML"),
    "twice": ("seed: 0\nrun_dir: x\nseed: 1\n", "has seed twice, in lines 1 and 3"),
    "twice, below": ("policy:\n  eta: 1\n  eta: 0.5\n", "has eta twice, in lines 2 and 3"),
    "twice, in a list": ("rewards:\n- name: a\n  name: b\n", "has name twice, in lines 2 and 3"),
    "a section twice": ("policy:\n  eta: 1\npolicy:\n  num_steps: 3\n", "has policy twice, in lines 1 and 3"),
    "twice on a line": ("policy: {eta: 1, eta: 1}\n", "has eta twice, in lines 1 and 1"),
    "deep lists": ("seed: " + "[" * 50_000, "nested more than 32 deep"),
    "deep mappings": ("seed: " + "{a: " * 40_000, "nested more than 32 deep"),
    "deep blocks": ("".join(f"{' ' * depth}a:\n" for depth in range(300)), "nested more than 32 deep"),
    "deep dashes": ("- " * 50_000, "nested more than 32 deep"),
    "an alias bomb": (_BOMB, "holds more than 20,000 values"),
    "an alias in itself": ("seed: &a [*a]\n", "has an alias inside of itself"),
    "a merge of itself": ("policy: &a\n  <<: *a\n", "has an alias inside of itself"),
    "a chain of aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000)),
        "holds more than 20,000 values",
    ),
    "a large file": ("# " + "x" * 300_000 + "\nseed: 0\n", "characters, and no config needs more"),
    "latin-1": ("run_dir: caf\xe9\n".encode("latin-1"), "is not UTF-8 text"),
    "utf-16": ("seed: 0\n".encode("utf-16"), "is not UTF-8 text"),
    "zeros": (b"\x00" * 100, "is not YAML"),
    "a PNG": (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is not UTF-8 text"),
    "an escape": ("seed: \x1b[2J\n", "is not YAML"),
    "nan": ("optimizer:\n  lr: .nan\n", "optimizer.lr=nan"),
    "inf": ("update:\n  clip_range: .inf\n", "update.clip_range=inf"),
    "nan of a weight": ("rewards:\n- name: jpeg_compressibility\n  weight: .nan\n", "rewards[0].weight=nan"),
    "inf of an argument": ("rewards:\n- name: a\n  arguments: {x: .inf}\n", "rewards[0].arguments.x=inf"),
    "a large integer": ("seed: " + "9" * 100 + "\n", "seed=9999"),
    "5,000 digits": ("seed: " + "9" * 5000 + "\n", "is not YAML"),
    "a hexadecimal bomb": ("seed: 0x" + "f" * 10_000 + "\n", "seed has a number of 40000 bits"),
    "a section without fields": ("policy:\n", "policy=None"),
    "a section as a number": ("policy: 3\n", "policy=3"),
    "a section as a list": ("policy: [eta]\n", "is a section"),
    "no value": ("seed:\n", "seed=None"),
    "a dotted key": ("policy.eta: 0.5\n", "write its section"),
    "an unknown key": ("sed: 3\n", "did you mean seed"),
    "another tool's key": ("learning_rate: 3\n", "optimizer.lr"),
    "a number as key": ("3: 4\n", "3 in "),
    "null as key": ("null: 4\n", "None in "),
    "rewards as a mapping": ("rewards: {name: a}\n", "is not a list"),
    "rewards of texts": ("rewards: [a, b]\n", "rewards[0]=a"),
    "rewards without a name": ("rewards: [{weight: 1}]\n", "rewards[0]"),
    "arguments as a list": ("rewards: [{name: a, arguments: [1]}]\n", "rewards[0].arguments"),
    "a wrong type": ("seed: yes please\n", "seed"),
    "a date": ("seed: 2026-11-22\n", "seed"),
    "true for a number": ("num_iterations: true\n", "num_iterations"),
    "a text for a switch": ("dry_run: perhaps\n", "dry_run"),
}


def yaml_files() -> list[Case]:
    """Files for --config."""
    found = [
        Case(name, writes("bad.yaml", content, "--config", "bad.yaml", "--dry_run=true"), says)
        for name, (content, says) in _YAML.items()
    ]
    for name, (content, says) in _YAML.items():  # the same as the value of an option
        if isinstance(content, str) and "\n" not in content.strip() and says.startswith(("nested", "has an alias")):
            value = content.strip().removeprefix("seed: ")
            found.append(Case(f"--rewards {name}", ["--rewards", value], f"rewards={value[:10]}"))
            found.append(Case(f"--lora.targets {name}", ["--lora.targets", value], "lora.targets="))
    return found
