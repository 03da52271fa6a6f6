"""Checkpoints: each one is complete or absent, and the last K are kept.

    run_dir/checkpoints/iteration_000050/     after 50 iterations
        engine/          shards of each process: trained weights, the optimizer's state (engine/shards.py); no pickles
        unet.safetensors the weights alone, float32, for people; adapters.safetensors if only adapters are trained
        ema.safetensors  the moving average of the trained weights, if ema.decay is not 0
        state.json       format, iteration, queries, prompt cursor, advantage statistics, number of processes
        index.json       all these files, their lengths and checksums (wholeness.py)

All ranks write a checkpoint under a temporary name; when all files and their folder are on the disk, it is renamed. So
a run that is killed at any moment, a loss of power or a full disk leaves the earlier checkpoints intact. The next
checkpoint deletes an unfinished one, if the run that failed could not do so.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from rlcm_fast import parallel
from rlcm_fast.engine.base import Engine
from rlcm_fast.engine.old_checkpoints import check_trust
from rlcm_fast.engine.tensor_files import sync_folder, write_json, write_tensors
from rlcm_fast.run_folder.best import Best
from rlcm_fast.run_folder.tracking import say
from rlcm_fast.run_folder.wholeness import STATE, damage, write_index

FORMAT = 2  # of the checkpoints that this version writes; 1 has no number in state.json, and is pickles

_PREFIX = "iteration_"
_REPLACED, _TRASH = ".replaced_", ".trash_"
_NAME = re.compile(_PREFIX + r"\d{6,}")


def save_checkpoint(run_dir: Path, iteration: int, engine: Engine, state: dict[str, Any], keep: int) -> Path:
    """Writes the state after `iteration` iterations and deletes all but the last `keep` and the best.

    Every rank must call.

    Raises:
        OSError: the disk of any rank is full or not writable, see `is_full_disk`; all ranks raise it. Earlier
            checkpoints are untouched, and nothing is left of this one.
    """
    # Write everything under a temporary name, on all ranks; under ZeRO-3 all must help to gather the weights.
    folder = run_dir / "checkpoints" / checkpoint_name(iteration)
    partial = folder.with_name(f".partial_{folder.name}")
    try:
        _on_all_ranks(lambda: _begin(partial))
        whole = engine.full_weights() if parallel.is_main() or engine.zero_stage == 3 else {}
        _on_all_ranks(lambda: _write(partial, engine, whole, state))
        _on_all_ranks(lambda: write_index(partial))
        _on_all_ranks(lambda: _publish(partial, folder))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

    # Delete the oldest, and those that a resumed run left behind by starting before them.
    if parallel.is_main():
        best = Best.find(run_dir)
        spared = best.folder(run_dir) if best else None
        earlier = [other for other in complete(run_dir) if _iteration(other) <= iteration and other != spared]
        abandoned = [other for other in complete(run_dir) if _iteration(other) > iteration]
        _delete([*earlier[:-keep], *abandoned], folder.parent)
    parallel.barrier()
    return folder


def checkpoint_name(iteration: int) -> str:
    """Returns the name of a checkpoint's folder."""
    return f"{_PREFIX}{iteration:06d}"


def is_full_disk(error: BaseException) -> bool:
    """Tells whether an OSError, or an error of safetensors or torch (which drops the reason), means a full disk."""
    texts = (
        "No space left on device",
        "Disk quota exceeded",
        "File too large",
        "PytorchStreamWriter failed writing",
        "unexpected pos ",
    )
    return any(text in str(error) for text in texts)


def load_checkpoint(folder: Path, engine: Engine, trusts_old: bool = False) -> dict[str, Any]:
    """Restores the engine, on any number of processes, and returns the state that was saved with it."""
    check_format(folder, trusts_old)
    engine.load(folder, trusts_old)
    return read_state(folder)


def check_format(folder: Path, trusts_old: bool) -> None:
    """Raises ValueError if this version cannot read the checkpoint, or if it is pickles and the user does not trust it.

    `damage` comes first: it tells whether state.json can be read at all.
    """
    format_ = read_state(folder).get("format", 1)
    if format_ > FORMAT:
        raise ValueError(
            f"resume={folder} has format {format_}, and this version reads up to {FORMAT}; install the version of "
            "rlcm_fast that wrote it"
        )
    if format_ == 1:
        check_trust(folder, trusts_old)


def read_state(folder: Path) -> dict[str, Any]:
    """Returns what `save_checkpoint` was given as `state`, and the checkpoint's format and number of processes."""
    return json.loads((folder / STATE).read_text())


def complete(run_dir: Path) -> list[Path]:
    """Lists the checkpoints, oldest first; unfinished ones and folders that a user put there have other names."""
    folders = (run_dir / "checkpoints").glob(f"{_PREFIX}*")
    return sorted((folder for folder in folders if _NAME.fullmatch(folder.name) and folder.is_dir()), key=_iteration)


def restore(run_dir: Path) -> None:
    """Gives a checkpoint its name back if the run was killed just when it replaced it; the run's writer alone may."""
    for replaced in (run_dir / "checkpoints").glob(f"{_REPLACED}*"):
        folder = replaced.with_name(replaced.name.removeprefix(_REPLACED))
        if not folder.exists():
            os.replace(replaced, folder)


def newest_whole(run_dir: Path, say: Callable[[str], None]) -> Path | None:
    """Returns the newest checkpoint that is whole, and says in one line each which newer ones are damaged."""
    for folder in reversed(complete(run_dir)):
        fault = damage(folder)
        if fault is None:
            return folder
        say(f"checkpoint {folder} is damaged ({fault}): the one before it is looked at")
    return None


def weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's weights alone, float32 on the CPU, by name; those of its adapters if it trained those."""
    adapters = folder / "adapters.safetensors"
    return load_file(adapters if adapters.is_file() else folder / "unet.safetensors")


def has_average(folder: Path) -> bool:
    """Tells whether the checkpoint also holds a moving average of its weights."""
    return (folder / "ema.safetensors").is_file()


def final_weights(folder: Path) -> dict[str, Tensor]:
    """Returns a checkpoint's weights for images, as `weights`: the moving average in place of the trained ones."""
    average = load_file(folder / "ema.safetensors") if has_average(folder) else {}
    return weights(folder) | average


def _begin(partial: Path) -> None:
    """Makes an empty folder, in place of what an earlier run left unfinished."""
    if parallel.is_main():
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def _write(folder: Path, engine: Engine, whole: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Writes this rank's files; all of them are on the disk when the call returns."""
    engine.save(folder)
    if parallel.is_main():
        adapters = {name: weight for name, weight in whole.items() if ".lora_" in name}
        write_tensors(folder / ("adapters.safetensors" if adapters else "unet.safetensors"), adapters or whole)
        write_json(folder / STATE, {**state, "format": FORMAT, "num_processes": parallel.world_size()})


def _publish(partial: Path, folder: Path) -> None:
    """Gives a checkpoint its final name, which lasts; it may replace one of the same iteration.

    No file system replaces a folder that has files. So the old one has another name for a moment, and `restore` gives
    it back its own if the run is killed in that moment.
    """
    if not parallel.is_main():
        return
    sync_folder(partial)
    if folder.exists():
        replaced = folder.with_name(f"{_REPLACED}{folder.name}")
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(folder, replaced)
    os.replace(partial, folder)
    sync_folder(folder.parent)


def _on_all_ranks(write: Callable[[], None]) -> None:
    """Writes on every rank, and raises OSError on all of them if one could not: none waits for one that is gone."""
    failed: OSError | None = None
    try:
        write()
    except OSError as error:
        failed = error
    said = [text for text in parallel.all_gather_list([str(failed or "")]) if text]
    if said:
        raise failed or OSError(said[0])


def _delete(folders: list[Path], parent: Path) -> None:
    """Deletes checkpoints and what earlier deletions left; what cannot be deleted is said and stays."""
    for folder in folders:
        try:
            _set_aside(folder)
        except OSError as error:
            say(f"checkpoint {folder} could not be deleted ({error}); the run goes on, delete it yourself")
    for trash in (*parent.glob(f"{_TRASH}*"), *parent.glob(f"{_REPLACED}*")):
        try:
            shutil.rmtree(trash)
        except OSError as error:
            say(f"{trash} could not be deleted ({error}); the run goes on, delete it yourself")


def _set_aside(folder: Path) -> None:
    """Renames a checkpoint before it is deleted, so that a half-deleted folder does not look like a checkpoint."""
    trash = folder.with_name(f"{_TRASH}{folder.name}")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(folder, trash)


def _iteration(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))
