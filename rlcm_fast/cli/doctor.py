"""Examine the machine, and with --config whether a run can start: files, rewards, endpoints, memory, disk.

It prints a table and a verdict. The exit code is 0 if a run can start, perhaps after downloads, and 1 if it cannot.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rlcm_fast.cli.arguments import whole
from rlcm_fast.config import bounds
from rlcm_fast.finite_json import finite_json

if TYPE_CHECKING:
    from rlcm_fast.cli.diagnoses import Diagnosis
    from rlcm_fast.config.resolved import ResolvedRun

_WIDTH = 32  # of the column that says what was looked at


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "rlcm-fast doctor [--config FILE] [--offline] [--section.field VALUE ...]"
    config = "a YAML file or a name of `rlcm-fast configs`; without it, only the machine is examined"
    parser.add_argument("--config", action="append", metavar="FILE", help=config)
    parser.add_argument("--processes", type=whole(1, bounds.PROCESSES), default=1, help="GPUs of the run")
    gpu = "rtx4090, h100, ...: compare the plan with this card instead of the machine's"
    parser.add_argument("--gpu", metavar="NAME", help=gpu)
    offline = "use no network: what is not in a folder or the hub's cache is missing, and endpoints are not asked"
    parser.add_argument("--offline", action="store_true", help=offline)
    files_only = "look for the rewards' files, but do not build the rewards to let them score a picture"
    parser.add_argument("--files-only", action="store_true", help=files_only)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    # Refuse what is no examination.
    if arguments.overrides and not arguments.config:
        raise ValueError(f"{arguments.overrides[0]} changes a config; name one with --config")
    if arguments.gpu is not None:
        from rlcm_fast.planner.gpus import find_gpu

        find_gpu(arguments.gpu)

    # Examine, and print each row as it comes.
    rows: list[Diagnosis] = []
    with _network(not arguments.offline):
        from rlcm_fast.cli.diagnoses import State, verdict

        for row in _rows(arguments):
            rows.append(row)
            if not arguments.json:
                print(f"{row.state.value:<6} {row.what:<{_WIDTH}} {row.words}", flush=True)

    # Sum up.
    last = verdict(rows)
    if arguments.json:
        found = [{"what": row.what, "state": row.state.value, "words": row.words, **row.numbers} for row in rows]
        print(finite_json({"verdict": last, "rows": found}, indent=2))
    else:
        print(last)
    return 1 if any(row.state is State.WRONG for row in rows) else 0


@contextmanager
def _network(is_used: bool) -> Iterator[None]:
    """Keeps huggingface_hub off the network inside, unless it `is_used`."""
    if is_used:
        yield
        return
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"  # for processes that start here
    from huggingface_hub import constants

    was_offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was_offline
        if before is None:
            del os.environ["HF_HUB_OFFLINE"]
        else:
            os.environ["HF_HUB_OFFLINE"] = before


def _rows(arguments: argparse.Namespace) -> Iterator[Diagnosis]:
    """Yields the rows of the machine, then those of the config."""
    from rlcm_fast.cli.diagnoses import Diagnosis, State, machine

    yield from machine.machine()
    yield machine.kernels()
    yield from machine.packages()
    if not arguments.config:
        return
    try:
        run = _read(arguments)
    except ValueError as error:
        yield Diagnosis("config", State.WRONG, str(error))
        return
    count = f"{arguments.processes} process{'' if arguments.processes == 1 else 'es'}"
    words = f"{', '.join(arguments.config)}: {run.sizes.samples_per_iteration} images in an iteration, {count}"
    yield Diagnosis("config", State.OK, words)
    yield from _rows_of_run(arguments, run)


def _read(arguments: argparse.Namespace) -> ResolvedRun:
    """The checked config; raises ValueError for a mistake, also in its prompts."""
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate
    from rlcm_fast.prompts import check_prompts

    run = validate(parse_config(_options(arguments)), arguments.processes)
    for task in run.tasks:
        check_prompts(task.source, task.source_field)
        check_prompts(task.evaluation, task.evaluation_field)
    return run


def _rows_of_run(arguments: argparse.Namespace, run: ResolvedRun) -> Iterator[Diagnosis]:
    """Yields the rows of model, rewards, memory and disk."""
    from rlcm_fast.cli.diagnoses import Diagnosis, State, room
    from rlcm_fast.cli.diagnoses.model import model_files
    from rlcm_fast.cli.diagnoses.rewards import asked_of, examine

    # The model and the rewards.
    rows = model_files(run.config.model)
    yield from rows
    for asked in asked_of(run):
        size = run.config.model.pixels
        for row in examine(asked, size, asks_endpoints=not arguments.offline, scores=not arguments.files_only):
            rows.append(row)
            yield row

    # Memory and disk, if the model can be planned.
    try:
        options = [*_options(arguments), *room.options_for_auto(run.config, arguments.gpu)]
        planned = room.planned_bytes([*options, "--processes", str(arguments.processes)])
    except ValueError as error:
        yield Diagnosis("memory and disk", State.NOTE, f"no plan: {error}")
        return
    yield room.memory_room(planned, arguments.gpu)
    download_gb = sum(row.numbers.get("download_gb", 0.0) for row in rows)
    yield from room.disk_room(run.config, planned, arguments.processes, download_gb)


def _options(arguments: argparse.Namespace) -> list[str]:
    """The config files and overrides, as train.py takes them."""
    files = [part for file in arguments.config for part in ("--config", file)]
    return [*files, *arguments.overrides]
