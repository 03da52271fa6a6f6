"""The door to training: `deepspeed rlcm_fast/train.py --config FILE`, or `python rlcm_fast/train.py` for one process.

It reads and checks the config before it imports torch, so a mistake costs a second and one line on stderr (exit code
2). Whatever is raised goes through `door.py`. The loop is in `trainer.py`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlcm_fast.config import Config
    from rlcm_fast.config.resolved import ResolvedRun
    from rlcm_fast.door import Door
    from rlcm_fast.given import Given


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, checks and trains.

    Returns the exit code: 0 done or stopped, 1 something went wrong (the finished iterations are saved if that was
    possible), 2 a mistake that ended it before training, 130 interrupted.
    """
    from rlcm_fast.door import Door, take_debug

    rank, world_size = set_process_environment()
    argv = sys.argv[1:] if argv is None else argv
    # A mistake is printed once per machine, because files may be missing on one of them.
    is_first_here = int(os.environ.get("LOCAL_RANK", rank)) == 0
    door = Door(rank, speaks=is_first_here, debug=take_debug(argv)[0])
    return door.lead(lambda: _work(door, argv, world_size))


def _work(door: Door, argv: Sequence[str], world_size: int) -> int:
    """Reads and checks the config, which may be all (a dry run), and trains."""
    config = _read_run(argv, door.rank, world_size).config
    if config.dry_run:
        return 0
    door.speaks, door.debug = True, config.debug
    from rlcm_fast.run_folder.failures import WordsOfRun
    from rlcm_fast.trainer import Trainer

    door.words = WordsOfRun(config)
    trainer = Trainer(config)
    door.has_begun = True
    trainer.run()
    return 0


def set_process_environment() -> tuple[int, int]:
    """Returns (rank, world size); describes a single process to DeepSpeed, which would otherwise ask for MPI."""
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"})
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")  # torch takes a free port, which no other run can take first
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


def find_own_package() -> None:
    """Removes rlcm_fast/ from sys.path, where Python puts a script's folder: its modules are not top-level names."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    if importlib.util.find_spec("rlcm_fast") is None:  # not installed: goes last, so it shadows nothing
        sys.path.append(str(here.parent))


def _read_run(argv: Sequence[str], rank: int, world_size: int) -> ResolvedRun:
    """Returns the checked config and what follows from it.

    Raises ValueError for everything that is known to fail before weights load.
    """
    from rlcm_fast.config import parse_config
    from rlcm_fast.given import NOTHING

    with _silent_unless(rank == 0):
        config = parse_config(argv)
        run = checked(config, world_size, NOTHING)
        if config.dry_run:
            _print_plan(run)
    return run


def checked(config: Config, world_size: int, given: Given) -> ResolvedRun:
    """Returns what follows from a config, if it can work with what a Python program gives beside it.

    Raises ValueError for everything that is known to fail before weights load.
    """
    from rlcm_fast import quiet
    from rlcm_fast.backbones.model_checks import check_hub, check_model
    from rlcm_fast.config.checks import validate

    quiet.hush_libraries(config.debug)
    run = validate(config, world_size)
    check_model(config.model)
    _check_plugins(run, given)
    if not config.dry_run:
        check_hub(config.model)
    return run


def _check_plugins(run: ResolvedRun, given: Given) -> None:
    """Checks that rewards, the files of their models, prompts and pairs exist.

    It needs torch, so it comes after all other checks. Rewards come first, because prompts may be on a network. A dry
    run opens no dataset and accepts rewards whose models are missing. Pairs are opened later, when the rewards are
    built (real_images.check_pairs).
    """
    from rlcm_fast.pairs import check_source
    from rlcm_fast.prompts import check_prompts, load_prompts
    from rlcm_fast.rewards import check_reward
    from rlcm_fast.run_folder.tracking import say

    # Collect what the tasks and the evaluation name.
    config = run.config
    named, sources = [("evaluation.rewards", config.evaluation.rewards)], []
    for task in run.tasks:
        named.append((task.rewards_field, list(task.rewards)))
        sources += [(task.source, task.source_field), (task.evaluation, task.evaluation_field)]

    # Check that all of it is there.
    for field, rewards in named:
        for index, reward in enumerate(rewards):
            for download in check_reward(reward, f"{field}[{index}]", not config.dry_run, given.rewards):
                say(f"{field}[{index}].name={reward.name} downloads {download}")
    for source, field in sources:
        if source in given.prompts:
            continue
        (check_prompts if config.dry_run else load_prompts)(source, field)
    if config.pretraining.weight > 0:
        check_source(config.pretraining.data)


def _print_plan(run: ResolvedRun) -> None:
    """Prints the resolved config as a file for --config, with the numbers that follow from it as comments."""
    from rlcm_fast.config import to_yaml

    print(to_yaml(replace(run.config, dry_run=False)) + "\n# derived")
    for name, value in asdict(run.sizes).items():
        print(f"# {name}: {value}")


@contextlib.contextmanager
def _silent_unless(speaks: bool) -> Iterator[None]:
    """Drops stdout on processes that do not speak, so that --help and the plan appear once."""
    with contextlib.ExitStack() as stack:
        if not speaks:
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
        yield


if __name__ == "__main__":
    find_own_package()
    exit_code = main()
    from rlcm_fast.leaving import leave_at_once_if_computing

    leave_at_once_if_computing(exit_code)
    sys.exit(exit_code)
