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
    from rlcm_fast.config import Config, RewardConfig
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
    if config.dry_run:
        _check_unimported(run, given)
    else:
        _check_plugins(run, given)
        check_hub(config.model)
    return run


def _check_plugins(run: ResolvedRun, given: Given) -> None:
    """Checks that rewards, the files of their models, prompts and pairs exist.

    It needs torch, so it comes after all other checks. Rewards come first, because prompts may be on a network. Pairs
    are opened later, when the rewards are built (real_images.check_pairs).
    """
    from rlcm_fast.pairs import check_source
    from rlcm_fast.prompts import load_prompts
    from rlcm_fast.rewards import check_reward
    from rlcm_fast.run_folder.tracking import say

    rewards, sources = _named(run, given)
    for field, reward in rewards:
        for download in check_reward(reward, field, must_run=True, given=given.rewards):
            say(f"{field}.name={reward.name} downloads {download}")
    for field, source in sources:
        load_prompts(source, field)
    if run.config.pretraining.weight > 0:
        check_source(run.config.pretraining.data)


def _check_unimported(run: ResolvedRun, given: Given) -> dict[str, str]:
    """Checks what a dry run can: it imports and calls nothing of yours, opens no dataset, and needs no models.

    Returns what a run would import, by the field that names it.
    """
    from rlcm_fast.pairs import check_source
    from rlcm_fast.prompts import check_prompts
    from rlcm_fast.rewards import check_reward, check_unimported

    rewards, sources = _named(run, given)
    imports: dict[str, str | None] = {}
    for field, reward in rewards:
        check_reward(reward, field, must_run=False, given=given.rewards)
        if reward.name not in given.rewards:
            imports |= {field: ", ".join(check_unimported(reward, field))}
    for field, source in sources:
        imports[field] = check_prompts(source, field)
    if run.config.pretraining.weight > 0:
        imports["pretraining.data"] = check_source(run.config.pretraining.data, may_import=False)
    return {field: module for field, module in imports.items() if module}


def _named(run: ResolvedRun, given: Given) -> tuple[list[tuple[str, RewardConfig]], list[tuple[str, str]]]:
    """Returns the rewards and the sources of prompts that tasks and evaluation name, each with its field."""
    named, sources = [("evaluation.rewards", run.config.evaluation.rewards)], []
    for task in run.tasks:
        named.append((task.rewards_field, list(task.rewards)))
        sources += [(task.source_field, task.source), (task.evaluation_field, task.evaluation)]
    rewards = [(f"{field}[{index}]", reward) for field, listed in named for index, reward in enumerate(listed)]
    return rewards, [(field, source) for field, source in sources if source not in given.prompts]


def _print_plan(run: ResolvedRun) -> None:
    """Prints the resolved config as a file for --config, with what follows from it as comments."""
    from rlcm_fast.config import to_yaml
    from rlcm_fast.given import NOTHING

    print(to_yaml(replace(run.config, dry_run=False)) + "\n# derived")
    for name, value in asdict(run.sizes).items():
        print(f"# {name}: {value}")
    for field, modules in _check_unimported(run, NOTHING).items():
        print(f"# {field}: a run imports {modules}")


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
