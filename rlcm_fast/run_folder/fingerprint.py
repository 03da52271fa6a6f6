"""What a checkpoint was trained with: the fields of its config, what its state depends on, the files of its model.

    {"fields": {"lora.alpha": 16.0, "rewards[jpeg_compressibility].weight": 1.0, ...},
     "tasks": {"default": {"prompts": [...], "rewards": [...]}},  the prompt cursor and the buffers depend on these
     "model": {"pipeline": {"unet/diffusion_pytorch_model.safetensors": {"size": ..., "mtime_ns": ..., "header": ...}},
               "unet": ..., "lora": ...}}                          or {"commit": ...} for a hub id

rules.py says what a difference means. A weight that was changed in place keeps its file's size and header, so only the
time tells; with model.hash_files, the SHA-256 of each file does.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from rlcm_fast.backbones.loading import resolve_model, split_hub_file
from rlcm_fast.config import Config, ModelConfig, RewardConfig
from rlcm_fast.config.marks import types_of
from rlcm_fast.config.resolved import Task, resolve

_ITEM = re.compile(r"\[[^\]]*\]")
_MOST_BYTES_OF_A_HEADER = 100_000_000  # the limit of safetensors itself

Files = dict[str, dict[str, Any]]


def flat(config: Config) -> dict[str, Any]:
    """Returns every field of a config by its dotted name, as JSON; items of lists by name, as rewards[jpeg].weight."""
    return dict(_leaves(config, ""))


def rule_name(name: str) -> str:
    """Returns the name of a field for all items of its list: rewards[].weight for rewards[jpeg].weight."""
    return _ITEM.sub("[]", name)


def fingerprint(config: Config, silent: Iterable[str], world_size: int) -> dict[str, Any]:
    """Returns the fingerprint without the model's files, as JSON.

    silent: names of rules whose fields are left out, because they change nothing about training.
    """
    hidden = frozenset(silent)
    kept = {name: value for name, value in flat(config).items() if rule_name(name) not in hidden}
    run = resolve(config, world_size)
    tasks = {task.name: _of_task(number, task, config.seed) for number, task in enumerate(run.tasks)}
    return _as_json({"fields": kept, "has_tasks": run.has_tasks, "tasks": tasks})


def _of_task(number: int, task: Task, seed: int) -> dict[str, Any]:
    """Returns what the cursor in the prompts depends on, and what the rewards in the buffers depend on."""
    return {
        "prompts": [number, task.source, task.num_prompts, seed],
        "rewards": sorted((_of_reward(reward) for reward in task.rewards), key=lambda reward: reward["name"]),
        **({} if task.rewards_combine == "sum" else {"rewards_combine": task.rewards_combine}),
    }


def _of_reward(reward: RewardConfig) -> dict[str, Any]:
    """Returns its settings; without those that earlier versions did not have, where they are at their default."""
    settings = asdict(reward)
    for name in ("label", "threshold"):
        if not settings[name]:
            del settings[name]
    return settings


def _leaves(section: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    hints = types_of(type(section))
    for field in fields(section):
        value, name = getattr(section, field.name), f"{prefix}{field.name}"
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.")
        elif item_class(hints[field.name]) is not None:
            for item in value:
                yield from _leaves(item, f"{name}[{_key(item)}].")
        else:
            yield name, _as_json([_plain(item) for item in value] if isinstance(value, list) else value)


def _key(item: Any) -> str:
    """Returns what tells an item of a list from the others: a reward's label, or its name."""
    return item.key if isinstance(item, RewardConfig) else item.name


def item_class(hint: Any) -> type | None:
    """Returns the dataclass of a list's items that have names, as RewardConfig for list[RewardConfig]; None else.

    A list of items without names is one value: where an item stands matters, as for model.loras.
    """
    items = get_args(hint) if get_origin(hint) is list else ()
    if not (items and is_dataclass(items[0]) and isinstance(items[0], type)):
        return None
    return items[0] if "name" in {field.name for field in fields(items[0])} else None


def _plain(item: Any) -> Any:
    return asdict(item) if is_dataclass(item) and not isinstance(item, type) else item


def _as_json(value: Any) -> Any:
    """Returns the value as reading its JSON would: lists for tuples, text for what JSON does not know."""
    return json.loads(json.dumps(value, default=str))


def model_files(model: ModelConfig) -> dict[str, Files]:
    """Describes the files that the model is loaded from, by part (pipeline, unet, lora) and by their place in it.

    A part that comes from the hub has one entry, "commit": the snapshot in the cache, None if there is none yet.
    """
    paths, revision = resolve_model(model), model.revision
    described: dict[str, Files] = {"pipeline": _part(paths.pipeline, "model_index.json", revision, model.hash_files)}
    if paths.unet is not None:
        described["pipeline"] = _part(paths.pipeline, "model_index.json", None, model.hash_files)
        described["unet"] = _part(paths.unet, "config.json", revision, model.hash_files)
    if paths.lora is not None:
        described["lora"] = _part(paths.lora, "pytorch_lora_weights.safetensors", None, model.hash_files)
    for number, (path, _) in enumerate(paths.loras):
        described[f"loras[{number}]"] = _part(path, "pytorch_lora_weights.safetensors", None, model.hash_files)
    if paths.vae is not None:
        described["vae"] = _part(paths.vae, "config.json", None, model.hash_files)
    return described


def _part(path: str, index: str, revision: str | None, with_hash: bool) -> Files:
    place = Path(path)
    if place.is_file():
        return {place.name: _described(place, with_hash)}
    if not place.is_dir():
        return {"commit": {"id": _commit(path, index, revision)}}
    files = sorted(_files_of(place, index))
    return {file.relative_to(place).as_posix(): _described(file, with_hash) for file in files}


def _files_of(folder: Path, index: str) -> Iterator[Path]:
    """Yields the files that diffusers may load: the index, and those in the folders of the parts that it names."""
    yield folder / index
    if index != "model_index.json":
        yield from folder.glob("*.safetensors")
        return
    for part in json.loads((folder / index).read_text()):
        if not part.startswith("_"):
            yield from (file for file in (folder / part).glob("*") if file.is_file() and not file.name.startswith("."))


def _described(file: Path, with_hash: bool) -> dict[str, Any]:
    status = file.stat()
    described: dict[str, Any] = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    if file.suffix.lower() == ".safetensors":
        described["header"] = _header_digest(file)
    if with_hash:
        with file.open("rb") as content:
            described["sha256"] = hashlib.file_digest(content, "sha256").hexdigest()
    return described


def _header_digest(file: Path) -> str:
    """Returns a hash of a safetensors header: the names, shapes, dtypes and places of all tensors."""
    with file.open("rb") as content:
        length = int.from_bytes(content.read(8), "little")
        return hashlib.sha256(content.read(min(length, _MOST_BYTES_OF_A_HEADER))).hexdigest()[:16]


def _commit(path: str, file: str, revision: str | None) -> str | None:
    """Returns the commit of the snapshot that the hub's cache holds of a hub id, or of a file in one."""
    from huggingface_hub import try_to_load_from_cache

    repository, named = split_hub_file(path)
    found = try_to_load_from_cache(repository, named or file, revision=revision)
    if not isinstance(found, str):
        return None
    return Path(found).parents[(named or file).count("/")].name


def changed_files(before: Mapping[str, Files], now: Mapping[str, Files]) -> tuple[list[str], list[str]]:
    """Returns which files differ for certain, with how they differ; and which have only another time.

    A hub's commit that is not known yet differs from nothing.
    """
    changed, touched = [], []
    for part in sorted({*before, *now}):
        old, new = before.get(part, {}), now.get(part, {})
        for name in sorted({*old, *new}):
            how = _difference(old.get(name), new.get(name))
            if how == "mtime_ns":
                touched.append(f"{part} {name}")
            elif how:
                changed.append(f"{part} {name} ({how})")
    return changed, touched


def _difference(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> str | None:
    """Returns how a file differs, in words; mtime_ns if only its time does; None if nothing does."""
    if old is None or new is None:
        return "new" if old is None else "gone"
    if "id" in old and "id" in new:
        is_other = None not in (old["id"], new["id"]) and old["id"] != new["id"]
        return f"commit {old['id']}, now {new['id']}" if is_other else None
    if old.get("size") != new.get("size"):
        return f"{old.get('size')} bytes, now {new.get('size')}"
    if old.get("header") != new.get("header"):
        return "other tensors"
    if "sha256" in old and "sha256" in new:
        return None if old["sha256"] == new["sha256"] else "other contents"
    return None if old.get("mtime_ns") == new.get("mtime_ns") else "mtime_ns"
