"""All processes of a run start from the same config in the same folder, or all of them end with one line.

A mistake that only one process sees would leave the others waiting for it. So every check here is collective: each
process says what it found, and all raise the same error. The main process prints it (train.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from rlcm_fast import parallel
from rlcm_fast.config import Config
from rlcm_fast.faults import SharedMistake
from rlcm_fast.run_folder.fingerprint import flat

T = TypeVar("T")

PATIENCE = 40.0  # seconds until a file of another node must be visible: NFS keeps what it knows of folders for 30

_OF_A_NODE = ("debug",)  # may differ between nodes: it only shows more or fewer lines


@contextmanager
def together() -> Iterator[None]:
    """Raises the first ValueError or OSError that any process meets in the block on all of them, as SharedMistake."""
    problem = None
    try:
        yield
    except (ValueError, OSError) as error:
        problem = str(error)
    problems = [text for text in parallel.all_gather_list([problem]) if text is not None]
    if problems:
        raise SharedMistake(problems[0])


def from_main(value: T) -> T:
    """Returns the main process's value on all processes; every rank must call."""
    return parallel.all_gather_list([value if parallel.is_main() else None])[0]  # pyright: ignore[reportReturnType]


def check_configs(config: Config) -> None:
    """Refuses configs that differ between processes, as with an edited file on one node; every rank must call.

    Raises:
        SharedMistake: it names each field that differs, and the first process that has another value.
    """
    fields = {name: value for name, value in flat(config).items() if name not in _OF_A_NODE}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    if len(set(parallel.all_gather_list([digest]))) == 1:
        return

    # Only now send all fields, because there may be hundreds of processes.
    everyone = parallel.all_gather_list([(socket.gethostname(), fields)])
    first = everyone[0][1]
    found = {}
    for rank, (host, theirs) in enumerate(everyone):
        for name in [name for name in {**first, **theirs} if first.get(name) != theirs.get(name)]:
            text = f"{name}={first.get(name)} on rank 0 and {theirs.get(name)} on rank {rank} ({host})"
            found.setdefault(name, text)
    raise SharedMistake(
        f"the processes have different configs: {'; '.join(found.values())}; give all nodes the same files and the "
        "same command"
    )


def check_folder(run_dir: Path, token: str | None, sees: Callable[[], str | None], patience: float = PATIENCE) -> None:
    """Refuses a run_dir that is not shared; every rank must call.

    token: what the main process wrote there; other processes may pass None. sees: reads it, None if nothing is there.
    patience: seconds until a process that does not see it counts as one that never will.

    Raises:
        SharedMistake: it names the nodes that do not see the file.
    """
    wanted = from_main(token)
    is_there = _waits_for(lambda: sees() == wanted, run_dir, patience)
    _refuse_blind(f"run_dir={run_dir}", is_there, "give a run_dir on a file system that all nodes mount")


def check_visible(file: Path, named: str, patience: float = PATIENCE) -> None:
    """Refuses a file that some process does not see; every rank must call. named: field=value that led to it."""
    is_there = _waits_for(file.is_file, file.parent, patience)
    _refuse_blind(named, is_there, f"look for {file} there, or start again when their file system has caught up")


def _waits_for(is_there: Callable[[], bool], folder: Path, patience: float) -> bool:
    """Tells whether something is there at last, within `patience` seconds."""
    end = time.monotonic() + patience
    while not is_there():
        if time.monotonic() > end:
            return False
        _refresh(folder.parent)
        time.sleep(min(0.2, patience))
    return True


def _refresh(folder: Path) -> None:
    """Lists a folder, which makes NFS ask its server what is in there."""
    if folder.is_dir():
        os.listdir(folder)


def _refuse_blind(named: str, is_there: bool, remedy: str) -> None:
    everyone = parallel.all_gather_list([(socket.gethostname(), is_there)])
    blind = {host: rank for rank, (host, sees) in reversed(list(enumerate(everyone))) if not sees}
    if blind:
        nodes = _listed([f"{host} (rank {rank})" for host, rank in sorted(blind.items(), key=lambda item: item[1])])
        raise SharedMistake(
            f"{named} is not shared: what {everyone[0][0]} wrote there is not seen on {nodes}; {remedy}"
        )


def _listed(names: Sequence[str], most: int = 8) -> str:
    """Joins names; of many, the first few and the number of the rest."""
    rest = [f"{len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *rest])
