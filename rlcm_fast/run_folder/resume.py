"""Finds where a run starts, before weights load: at 0, at a checkpoint of it, or at 0 with another run's weights.

    begin(config)     configs of all processes -> lock -> run_dir is shared -> checkpoint -> its settings against ours
    RunFolder.load    restores the engine, and leaves out of the rest what changed settings make void
    RunFolder.save    writes a checkpoint with the fingerprint that a later start compares

Every mistake ends all processes with one line. rules.py says what a changed setting means, and docs/resume.md too.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from rlcm_fast import parallel
from rlcm_fast.config import Config
from rlcm_fast.engine.base import Engine
from rlcm_fast.report import read_run
from rlcm_fast.run_folder import checkpoint as checkpoints
from rlcm_fast.run_folder import lock as locks
from rlcm_fast.run_folder.agreement import check_configs, check_folder, check_visible, from_main, together
from rlcm_fast.run_folder.fingerprint import changed_files, fingerprint, model_files
from rlcm_fast.run_folder.lock import Lock
from rlcm_fast.run_folder.rules import SILENT, Fingerprint, changes
from rlcm_fast.run_folder.tracking import say

_KEY = "fingerprint"  # in state.json
_NOISE = {"rollout_noise": "row seeds"}  # in state.json; older versions drew noise for each micro-batch


class RunFolder:
    """A run's hold on its folder, and the checkpoints in it."""

    def __init__(self, config: Config, lock: Lock | None, checkpoint: Path | None) -> None:
        """lock: on the main process only. checkpoint: the one that the run goes on from; None for a new run."""
        self.run_dir = Path(config.run_dir)
        self._config, self._lock = config, lock
        self.checkpoint = checkpoint  # the run's last one: where it goes on from, or what it has saved since
        self._now = fingerprint(config, SILENT, parallel.world_size())
        self._model: dict[str, Any] | None = None

    def load(self, engine: Engine) -> dict[str, Any] | None:
        """Restores the engine and returns the rest of the state for `load_state_dict`; None if the run is new."""
        if self.checkpoint is None:
            return None
        state = checkpoints.load_checkpoint(self.checkpoint, engine, self._config.trust_old_checkpoint)
        before = state.get(_KEY)
        if before is None:
            return state

        # The hub's model is known only now that it is loaded.
        with together():
            if parallel.is_main():
                _check_files(self._config, before, self._described_model(), self.checkpoint)
        if engine.lr != before["lr"]:
            say(f"learning rate of the next update: {before['lr']:.3g} -> {engine.lr:.3g}, by the changed settings")
        return carried_over(state, before, self._now)

    def save(self, iteration: int, engine: Engine, state: Mapping[str, Any]) -> None:
        """Writes a checkpoint after `iteration` iterations; every rank must call."""
        model = self._described_model() if parallel.is_main() else {}
        whole = {**state, **_NOISE, _KEY: {**self._now, "model": model, "lr": engine.lr}}
        keep = self._config.checkpoint.keep
        self.checkpoint = checkpoints.save_checkpoint(self.run_dir, iteration, engine, whole, keep)

    def settle(self, config: Config) -> None:
        """Takes the config as it will run, before the first checkpoint: trials may have changed it."""
        self._config, self._now = config, fingerprint(config, SILENT, parallel.world_size())

    def close(self) -> None:
        """Lets go of the folder."""
        if self._lock:
            self._lock.release()

    def _described_model(self) -> dict[str, Any]:
        """Describes the model's files, once for the run: they are read again only by the next one."""
        if self._model is None:
            self._model = model_files(self._config.model)
        return self._model


def begin(config: Config) -> RunFolder:
    """Takes the run folder and finds where the run starts; every rank must call, before any weights load.

    Raises:
        SharedMistake: on all processes, if one of them found a reason not to start.
    """
    # Agree on the config, then take the folder. Taking it creates it, so a folder that must be there is looked for.
    run_dir = Path(config.run_dir)
    check_configs(config)
    with together():
        if parallel.is_main():
            check_run_dir(config)
    lock = None
    with together():
        if parallel.is_main():
            lock = locks.take(run_dir, say)

    # Find the checkpoint and compare what it was trained with; let go of the folder if that ends the run.
    try:
        check_folder(run_dir, lock.token if lock else None, lambda: locks.token_in(run_dir))
        found = None
        with together():
            if parallel.is_main():
                found = _found(config, run_dir)
        found = from_main(found)
        if found:
            check_visible(found / "state.json", f"resume={found}")
        with together():
            if found and parallel.is_main():
                _check_settings(config, found)
    except BaseException:
        if lock:
            lock.release()
        raise
    return RunFolder(config, lock, found)


def check_run_dir(config: Config) -> None:
    """Raises ValueError if a new run would begin in the folder of another, or if there is no run to go on with.

    A run that ended before its first iteration has left nothing that a new one could harm.
    """
    run_dir = Path(config.run_dir)
    if config.resume == "latest" and not run_dir.is_dir():
        raise ValueError(f"resume=latest finds no run in run_dir={run_dir}; check run_dir, or leave resume out")
    if config.resume is None and (_num_lines(run_dir) > 0 or checkpoints.complete(run_dir)):
        raise ValueError(
            f"run_dir={run_dir} already holds a run; go on with --resume latest, or give another --run_dir"
        )


def _found(config: Config, run_dir: Path) -> Path | None:
    """Finds the checkpoint that the run goes on from; None if it starts at 0."""
    checkpoints.restore(run_dir)
    resume, num_lines = config.resume, _num_lines(run_dir)
    if resume is None:
        check_run_dir(config)  # once more, now that no other run can begin here
        if config.resume_weights_only:
            _check_weights(config, _weights_folder(config.resume_weights_only))
        return None
    if resume != "latest":
        return _named_checkpoint(resume, run_dir, num_lines)
    found = checkpoints.newest_whole(run_dir, say)
    if found is None and num_lines == 0 and not checkpoints.complete(run_dir):
        say(f"run_dir={run_dir} has no checkpoint and no metrics: starting at 0")
    elif found is None and _ended_before_a_checkpoint(run_dir):
        aside = _set_lines_aside(run_dir)
        say(f"run_dir={run_dir} ended before its first checkpoint: starting at 0; its metrics are in {aside.name}")
    elif found is None:
        raise ValueError(
            f"resume=latest finds no whole checkpoint in {run_dir}/checkpoints, and its {num_lines} lines of "
            "metrics.jsonl are of a run that had some; put the checkpoints back, or start a new run with another "
            "--run_dir (from other weights with --resume_weights_only PATH)"
        )
    return found


def _ended_before_a_checkpoint(run_dir: Path) -> bool:
    """Tells whether a run ended before its first checkpoint was due, by its own config and metrics."""
    if checkpoints.complete(run_dir):
        return False
    run = read_run(run_dir)
    due = run.config.get("checkpoint.every") or run.num_planned
    return isinstance(due, int) and all(line["iteration"] < due for line in run.lines)


def _set_lines_aside(run_dir: Path) -> Path:
    """Gives metrics.jsonl the first free name of metrics.jsonl.1, .2, ..., and returns that file."""
    lines = run_dir / "metrics.jsonl"
    aside = next(file for number in itertools.count(1) if not (file := Path(f"{lines}.{number}")).exists())
    return lines.rename(aside)


def _named_checkpoint(resume: str, run_dir: Path, num_lines: int) -> Path:
    """Checks a checkpoint that was given by its folder."""
    folder = Path(resume)
    fault = checkpoints.damage(folder)
    if fault:
        raise ValueError(
            f"resume={resume} is no checkpoint that can be resumed: {fault}; give latest or a folder in "
            f"{run_dir}/checkpoints"
        )
    is_own = folder.resolve().parent == (run_dir / "checkpoints").resolve()
    if num_lines > 0 and not is_own:
        raise ValueError(
            f"resume={resume} is another run's checkpoint, and run_dir={run_dir} already holds a run; go on with "
            "--resume latest, or give another --run_dir"
        )
    names = [other.name for other in checkpoints.complete(run_dir)]
    newer = names[names.index(folder.name) + 1 :] if is_own and folder.name in names else []
    if newer:
        say(f"going back to {folder.name}: the next checkpoint deletes {', '.join(newer)}; later metrics are dropped")
    return folder


def _num_lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    if os.path.lexists(path) and not path.is_file():
        raise ValueError(
            f"run_dir={run_dir} has a {path.name} that is no plain file; remove it, or give another run_dir"
        )
    return len(path.read_bytes().splitlines()) if path.exists() else 0


def _check_settings(config: Config, checkpoint: Path) -> None:
    """Refuses settings that the checkpoint cannot go on with; says which others changed."""
    # Refuse a format that this version does not read, and pickles that the user did not ask for.
    checkpoints.check_format(checkpoint, config.trust_old_checkpoint)

    # A run that has all its iterations may be evaluated and exported again, but not shortened.
    state = checkpoints.read_state(checkpoint)
    missing = [name for name in ("iteration", "queries", "tasks") if name not in state]
    if missing:
        raise ValueError(
            f"resume={config.resume}: {checkpoint}/state.json has no {missing[0]}; name another checkpoint's folder"
        )
    finished = state["iteration"]
    if finished > config.num_iterations:
        raise ValueError(
            f"num_iterations={config.num_iterations} is fewer than the {finished} that {checkpoint} has finished: there"
            " is nothing to do; raise num_iterations, or resume an earlier checkpoint by its folder"
        )

    # Compare the settings; refuse before saying anything.
    before = state.get(_KEY)
    if before is None:
        say(f"{checkpoint} does not say what it was trained with: its settings cannot be compared with this config")
    else:
        _compare(config, before, checkpoint)
    if state.keys().isdisjoint(_NOISE) and finished < config.num_iterations:
        say(
            f"{checkpoint} is of a version that drew the noise of rollouts in another way: the images to come have"
            " other noise than in a run that was not interrupted"
        )
    if finished == config.num_iterations:
        say(
            f"{checkpoint} has all {finished} iterations: evaluating and exporting again; raise num_iterations to train"
        )


def _compare(config: Config, before: Fingerprint, checkpoint: Path) -> None:
    """Refuses changes that the checkpoint cannot go on with; says the others."""
    model = model_files(config.model)
    now = {**fingerprint(config, SILENT, parallel.world_size()), "model": model}
    found = changes(before, now)
    for change in found:
        if change.rule.kind == "refused":
            raise ValueError(change.refusal(str(checkpoint)))
    _check_files(config, before, model, checkpoint)
    for change in found:
        say(change.line())
    _, touched = changed_files(before["model"], model)
    if touched:
        say(
            f"model.path={config.model.path} has files of another time, with the size and tensors that the checkpoint "
            f"noted ({', '.join(touched[:3])}): model.hash_files=true would compare their contents"
        )


def _check_files(config: Config, before: Fingerprint, model: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuses a model whose files are others under the same name."""
    changed, _ = changed_files(before["model"], model)
    if changed and config.model.path == before["fields"]["model.path"]:
        raise ValueError(
            f"model.path={config.model.path} is not the model that the checkpoint was trained from: {changed[0]}; put "
            f"it back, or start a new run from its weights alone: --resume_weights_only {checkpoint}"
        )


def carried_over(state: Mapping[str, Any], before: Fingerprint, now: Fingerprint) -> dict[str, Any]:
    """Returns the state without what changed settings make void: prompt cursors, advantage buffers, pairs of images.

    A task's cursor goes on if its prompts, its place among the tasks, its share and the seed are the same; its buffers
    if its rewards are. A part that starts anew is None, or without entries.
    """
    voided = {change.rule.voids for change in changes(before, now)}
    saved, old, new = state["tasks"], before["tasks"], now["tasks"]

    def keeps(task: str, part: str) -> bool:
        return task in old and old[task][part] == new[task][part]

    # Prompts and buffers, task by task; without tasks, the state of the buffers has no names.
    prompts = {name: saved["prompts"][name] if keeps(name, "prompts") else None for name in new}
    of_task = saved["advantages"] if before["has_tasks"] else {"default": saved["advantages"]}
    is_kind = before["has_tasks"] == now["has_tasks"] and "buffers" not in voided
    buffers = {name: of_task[name] if is_kind and keeps(name, "rewards") else {} for name in new}
    tasks = {"prompts": prompts, "advantages": buffers if now["has_tasks"] else buffers["default"]}
    guard = None if "guard" in voided else state.get("guard")
    return {**state, "tasks": tasks, "guard": guard, "pretraining": None if "pairs" in voided else state["pretraining"]}


def start_weights(config: Config) -> dict[str, Tensor]:
    """Returns the weights of resume_weights_only, float32 on the CPU; {} without it. Those of adapters have .lora_."""
    if config.resume_weights_only is None:
        return {}
    folder = _weights_folder(config.resume_weights_only)
    average = "; its moving average, ema.safetensors, is not used" if checkpoints.has_average(folder) else ""
    say(f"starting at 0 from the trained weights of {folder}{average}")
    return checkpoints.weights(folder)


def put_weights(weights: Mapping[str, Tensor], network: nn.Module, named: str) -> None:
    """Copies weights into a network, which may hold others that they do not name if they are adapters.

    Raises:
        ValueError: names or shapes differ; `named` is the field and its value that they come from.
    """
    present = network.state_dict()
    wanted = {name for name in present if ".lora_" in name} or present.keys()
    misfits = set(weights) ^ set(wanted)
    misfits |= {name for name in weights.keys() & present.keys() if weights[name].shape != present[name].shape}
    if misfits:
        raise ValueError(
            f"{named} does not fit this model: {min(misfits)} is missing or has another shape, for example; give the "
            "model.path and the lora.rank and lora.targets that its run had"
        )
    network.load_state_dict(dict(weights), strict=False)


def _weights_folder(path: str) -> Path:
    """Finds the checkpoint that resume_weights_only names: itself, or the newest of a run or of its checkpoints/."""
    folder = Path(path)
    if (folder / "state.json").is_file():
        return folder
    run_dir = folder.parent if folder.name == "checkpoints" else folder
    found = checkpoints.newest_whole(run_dir, say)
    if found is None:
        raise ValueError(
            f"resume_weights_only={path} holds no checkpoint; give a folder with state.json, a run's folder or its "
            "checkpoints/"
        )
    return found


def _check_weights(config: Config, folder: Path) -> None:
    """Refuses damaged weights, and adapters that the run has no place for, by their names and shapes, without loading.

    folder: the checkpoint, which is known to be whole unless the config names it.
    """
    # What all weights need is known only from the model; put_weights checks it.
    adapters, whole = folder / "adapters.safetensors", folder / "unet.safetensors"
    fault = checkpoints.damage(folder) if str(folder) == config.resume_weights_only else None
    if fault is None and not adapters.is_file() and not whole.is_file():
        fault = f"it has no {whole.name}"
    if fault:
        raise ValueError(f"resume_weights_only={folder} is no whole checkpoint: {fault}; give another")
    if not adapters.is_file():
        return
    named, remedy = f"resume_weights_only={config.resume_weights_only}", "or give an export of that run as model.path"
    with safe_open(adapters, framework="pt") as file:
        rank = max(file.get_slice(name).get_shape()[0] for name in file.keys() if "lora_A" in name)  # noqa: SIM118
    if config.lora.rank != rank:
        raise ValueError(
            f"{named} holds adapters of rank {rank}, and lora.rank={config.lora.rank}; set lora.rank={rank}, {remedy}"
        )
    fields = checkpoints.read_state(folder).get(_KEY, {}).get("fields", {})
    alpha = fields.get("lora.alpha", config.lora.alpha)
    if config.lora.alpha != alpha:
        raise ValueError(
            f"{named} holds adapters of lora.alpha={alpha}, and lora.alpha={config.lora.alpha} would make them "
            f"{config.lora.alpha / alpha:.3g} times as strong; set lora.alpha={alpha}, {remedy}"
        )
