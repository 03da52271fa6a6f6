"""What a Python program hands over to a run, as a config and objects: rewards, prompts, a pipeline in memory.

    rewards     names and importable classes stay names; other objects are called python:NAME and kept in a Given
    prompts     a list, or what a function returns, becomes RUN_DIR/prompts_DIGEST.jsonl
    pipeline    becomes RUN_DIR/start_model_DIGEST, a diffusers folder

Digests are of the contents. So a run that resumes finds the files of equal objects and writes nothing, and other
contents are another file, which the checkpoint's fingerprint notices.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlcm_fast.file_modes import share
from rlcm_fast.given import PREFIX
from rlcm_fast.plugins import load_class
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.trajectory import Prompt

_FORMS = "a name, a function or object, (either, weight), or {'name': either, 'weight': 1.0, ...}"


class Handover:
    """Turns objects into values of config fields, and writes nothing before `write`."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._files: dict[Path, str] = {}
        self._written: list[Path] = []
        self.rewards: dict[str, Any] = {}
        """The rewards that the config calls python:NAME, by that name."""

    def entries(self, rewards: Iterable[Any], field: str) -> list[dict[str, Any]]:
        """Returns the rewards as the config has them; raises ValueError for what is no reward."""
        if isinstance(rewards, str | Mapping) or callable(rewards) or not isinstance(rewards, Iterable):
            raise ValueError(f"{field}={rewards} is no list; write {field}=[...] around it")
        return [self._entry(item, f"{field}[{index}]") for index, item in enumerate(rewards)]

    def _entry(self, item: Any, where: str) -> dict[str, Any]:
        # Read the forms that an item may have.
        entry: dict[str, Any] = dict(item) if isinstance(item, Mapping) else {"name": item}
        if isinstance(item, tuple) and len(item) == 2:
            entry = {"name": item[0], "weight": item[1]}
        reward = entry.get("name")
        if "name" not in entry or isinstance(reward, str):
            return entry

        # Name what is no name: a class that can be imported by its place, other objects python:NAME.
        if isinstance(reward, type):
            if _is_importable(reward):
                return {**entry, "name": f"{reward.__module__}:{reward.__qualname__}"}
            reward = reward(**entry.pop("arguments", {}))
        name, code = self._keep_reward(reward, where)
        return {**entry, "name": name, "arguments": {"code": code} if code else {}}

    def _keep_reward(self, reward: Any, where: str) -> tuple[str, str | None]:
        """Keeps an object under a name of its own; returns the name and a digest of its code."""
        from rlcm_fast.rewards import Reward, SetReward
        from rlcm_fast.rewards.functions import FunctionReward, code_digest, name_of

        is_ours = isinstance(reward, Reward | SetReward)
        if not is_ours and not callable(reward):
            raise ValueError(f"{where}={reward!r} is no reward; give {_FORMS}")
        name = f"{PREFIX}{name_of(reward)}"
        kept = reward if is_ours else FunctionReward(reward)
        if name in self.rewards:
            raise ValueError(f"{where} is called {name}, as another reward; give each function a name by `def`")
        self.rewards[name] = kept
        return name, code_digest(reward)

    def source(self, prompts: str | Path | Iterable[Any] | Callable[[], Iterable[Any]], field: str) -> str:
        """Returns the source of prompts as the config has it; raises ValueError for what is no prompt."""
        if isinstance(prompts, str | Path):
            return str(prompts)
        found = list(prompts() if callable(prompts) else prompts)
        lines = [_line(prompt, f"{field}[{index}]") for index, prompt in enumerate(found)]
        if not lines:
            raise ValueError(f"{field}=[] holds no prompts; give at least one")
        content = "".join(f"{line}\n" for line in lines)
        path = self._run_dir / f"prompts_{_digest(content.encode())}.jsonl"
        self._files[path] = content
        return str(path)

    def write(self) -> None:
        """Writes the prompts into the run's folder."""
        for path, content in self._files.items():
            self._write(path, lambda unfinished, content=content: unfinished.write_text(content, encoding="utf-8"))

    def _write(self, path: Path, save: Callable[[Path], object]) -> None:
        """Writes a file or folder, unless it is there; first under another name, so that what bears it is whole."""
        if path.exists():
            return
        unfinished = path.with_name(f".partial_{path.name}")
        shutil.rmtree(unfinished, ignore_errors=True)
        save(unfinished)
        os.replace(unfinished, path)
        self._written.append(path)

    @contextlib.contextmanager
    def taken_back_if_refused(self) -> Iterator[None]:
        """Removes what was written in the block if it raises a ValueError: a start that is refused leaves nothing."""
        try:
            yield
        except ValueError:
            for path in self._written:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()
            raise

    def keep_pipeline(self, pipeline: Any) -> str:
        """Saves a pipeline in memory, unless the folder has it, and returns the path of its folder.

        Raises:
            ValueError: it cannot be saved as it is, or the run in the folder was trained from another one.
        """
        _check_pipeline(pipeline)
        folder = self._run_dir / f"start_model_{_digest_of_pipeline(pipeline)}"
        if folder.is_dir():
            return str(folder)
        others = sorted(self._run_dir.glob("start_model_*"))
        if others and (self._run_dir / "checkpoints").is_dir():
            raise ValueError(
                f"pipeline_or_path is not the pipeline that run_dir={self._run_dir} was trained from; give that one as "
                f"it was, which is {others[0]}"
            )
        say(f"the pipeline is saved as {folder}, which the run starts from and resumes with")
        self._write(folder, lambda unfinished: _without_checker(pipeline).save_pretrained(unfinished))
        share(folder)
        return str(folder)


def _is_importable(kind: type) -> bool:
    """Tells whether another process finds this very class by its module and name, and a config may name it."""
    module = sys.modules.get(kind.__module__)
    if kind.__module__ == "__main__" or module is None or "<locals>" in kind.__qualname__:
        return False
    try:
        return load_class(f"{kind.__module__}:{kind.__qualname__}") is kind
    except ValueError:
        return False


def _line(prompt: Any, where: str) -> str:
    if isinstance(prompt, str) and prompt.strip():
        return json.dumps({"text": prompt})
    if isinstance(prompt, Prompt) and prompt.text.strip():
        return json.dumps({"text": prompt.text, "task": prompt.task, **prompt.details})
    raise ValueError(f"{where}={prompt!r} is no prompt; give a text that is not empty")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


def _check_pipeline(pipeline: Any) -> None:
    """Refuses what no folder can hold or no run can start from, before anything is written."""
    from diffusers import DiffusionPipeline, UNet2DConditionModel

    given = f"pipeline_or_path is a {type(pipeline).__name__}"
    unet = pipeline.components.get("unet") if isinstance(pipeline, DiffusionPipeline) else None
    if not isinstance(unet, UNet2DConditionModel):
        raise ValueError(f"{given}; give a Stable Diffusion, SDXL or LCM pipeline of diffusers, a folder or a hub id")
    if any(".lora_" in name for name, _ in unet.named_parameters()):
        raise ValueError(f"{given} with LoRAs beside its UNet; call its fuse_lora() and unload_lora_weights() first")
    if unet.config.get("quantization_config") is not None:
        raise ValueError(f"{given} with a quantized UNet, whose weights cannot be trained; load it without")
    if any(weight.is_meta for weight in unet.parameters()):
        raise ValueError(f"{given} whose weights are offloaded; call its remove_all_hooks() first")


def _without_checker(pipeline: Any) -> Any:
    """Returns the pipeline without the safety checker, which a run does not use."""
    if pipeline.components.get("safety_checker") is None:
        return pipeline
    parts = {**pipeline.components, "safety_checker": None}
    return type(pipeline)(**parts, requires_safety_checker=False)


def _digest_of_pipeline(pipeline: Any) -> str:
    """Returns a hash of all weights and of the configs of all parts."""
    import torch

    digest = hashlib.sha256()
    for name, part in sorted(pipeline.components.items()):
        if name == "safety_checker" or part is None:
            continue
        if isinstance(part, torch.nn.Module):
            for key, weight in part.state_dict().items():
                plain = weight.detach().cpu().contiguous()
                digest.update(f"{name}.{key} {plain.dtype} {tuple(plain.shape)}".encode())
                digest.update(plain.reshape(-1).view(torch.uint8).numpy())
        elif name == "scheduler":
            settings = {key: value for key, value in part.config.items() if not key.startswith("_")}
            digest.update(json.dumps([type(part).__name__, settings], sort_keys=True, default=str).encode())
    return digest.hexdigest()[:8]
