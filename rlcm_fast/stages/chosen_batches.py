"""Replaces `auto` when a run starts: numbers by those that its folder has noted or those that fit now, then the rest.

    start of the processes -> choose_batches -> a config of numbers -> [size_trial.py lowers them] -> config.yaml,
    fingerprint, all parts

On a GPU the main process plans, which takes 10 to 30 seconds, for the GPU with the least memory of all. On a CPU the
numbers are fixed (config/batches.py). A run that resumes keeps its numbers and engine.compile, so its fingerprint does
not change. What engine.graphs and engine.offload_idle of auto become is planned at every start on a GPU, beside these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlcm_fast import parallel
from rlcm_fast.config import Config, EngineConfig
from rlcm_fast.config.batches import (
    AUTO,
    Batches,
    Candidates,
    batches_of,
    compile_modes,
    for_cpu,
    has_auto,
    is_open,
    with_batches,
    with_numbers,
)
from rlcm_fast.config.checks import validate
from rlcm_fast.planner.batches import choices, choose, engine_of, sizes_of, with_engine, with_sizes
from rlcm_fast.planner.estimate import Strategy
from rlcm_fast.planner.memory import Memory
from rlcm_fast.planner.of_config import planner_of
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.run_folder.agreement import from_main, together
from rlcm_fast.run_folder.noted_batches import noted_batches, noted_engine
from rlcm_fast.run_folder.resume import check_run_dir
from rlcm_fast.run_folder.tracking import say

_GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """Planned memory of a run with any sizes; only the main process has the planner."""

    candidates: Candidates
    of_main: tuple[Planner, Strategy] | None = None

    def memory(self, sizes: Batches) -> Memory:
        """Returns the plan with these sizes, the same on all processes; every rank must call."""
        found = None
        if self.of_main is not None:
            planner, strategy = self.of_main
            found = planner.memory(with_sizes(strategy, sizes))
        planned = from_main(found)
        assert planned is not None
        return planned


@dataclass(frozen=True)
class Choice:
    """A config of numbers, and how they were found."""

    config: Config
    plan: Plan | None = None  # what chose them now, on a GPU; None where they are to stay
    lowers_rollouts: bool = False  # in the run: the size was auto, and no other process would have to follow
    lowers_updates: bool = False
    asked: EngineConfig = field(default_factory=EngineConfig)  # as the user wrote it, with what is auto


def choose_batches(config: Config, device: torch.device, tell: Callable[[str], None] = say) -> Choice:
    """Puts numbers and choices in place of `auto`, the same on all processes; every rank must call.

    engine.graphs=auto stays where a GPU has room for graphs beside the numbers, and becomes off elsewhere.

    Raises:
        SharedMistake: the planner does not know the model, or the run's folder is another run's.
    """
    # Leave a config as it is in which nothing is auto.
    asked, is_gpu = config.engine, device.type == "cuda"
    config = _as_before(config) if is_gpu else for_cpu(config)
    if not parallel.any_rank(is_open(config) if is_gpu else has_auto(config)):
        return Choice(config, asked=asked)

    # Choose on the main process.
    memory = min(parallel.all_gather_list([_memory_gib(config, device)]))
    found, of_main = None, None
    with together():
        if parallel.is_main():
            check_run_dir(config)  # a mistake is told before the planning
            found, of_main = _chosen(config, memory if is_gpu else None, tell)

    # Tell all. A rank whose config has no auto keeps its own; begin() then tells how the configs differ.
    batches, engine = from_main(found)  # pyright: ignore[reportGeneralTypeIssues]
    is_planned = from_main(of_main is not None)
    plan = Plan(Candidates.of(config, parallel.world_size()), of_main) if is_planned and has_auto(config) else None
    sizes, is_alone = batches_of(config), parallel.world_size() == 1
    lowers_rollouts, lowers_updates = (is_alone and size == AUTO for size in (sizes.rollout, sizes.update))
    chosen = with_batches(config, batches) if has_auto(config) else config
    return Choice(with_engine(chosen, engine), plan, lowers_rollouts, lowers_updates, asked)


def _as_before(config: Config) -> Config:
    """Returns the config with the fields of `engine` that a run that resumes keeps; every rank must call."""
    if not parallel.any_rank(config.resume is not None):
        return config
    return with_engine(config, from_main(noted_engine(config, _folder(config))) or {})


def _folder(config: Config) -> Path:
    """Returns the folder of the run that is resumed, or of a new one."""
    if config.resume is None or config.resume == "latest":
        return Path(config.run_dir)
    return Path(config.resume).resolve().parent.parent


def _chosen(
    config: Config, memory_gib: float | None, tell: Callable[[str], None]
) -> tuple[tuple[Batches, dict[str, Any]], tuple[Planner, Strategy] | None]:
    """Finds the numbers and fields of `engine`, and says so; the planner comes with numbers that it chose.

    memory_gib: of the smallest GPU; None on a CPU.
    """
    # Numbers of the config, of the run that resumes, or of a CPU stay.
    fixed = _fixed(config, memory_gib is None, tell)
    numbered = config if fixed is None else with_batches(config, fixed)
    if fixed is not None and (memory_gib is None or not is_open(numbered)):
        return (fixed, {}), None
    assert memory_gib is not None

    # Choose the rest beside them.
    run = validate(config, parallel.world_size())
    try:
        planner, strategy = planner_of(run)
    except ValueError as error:
        if fixed is None:
            raise ValueError(f"a micro-batch of auto needs a plan, and {error}; or give numbers") from error
        return (fixed, _without_a_plan(config, error, tell)), None
    candidates = Candidates.of(numbered, parallel.world_size())
    chosen, fits = choose(planner, strategy, candidates, memory_gib)
    if fixed is None:
        words = "the largest planned to fit" if fits else "the smallest, and the plan is that they do not fit"
        tell(f"auto: {sizes_of(chosen)}, {words} {memory_gib:.1f} GiB")
    for line in choices(planner, strategy, chosen, candidates):
        tell(line)
    return (sizes_of(chosen), engine_of(chosen)), (planner, chosen) if fixed is None else None


def _without_a_plan(config: Config, error: ValueError, tell: Callable[[str], None]) -> dict[str, Any]:
    """Returns what needs the least memory, and says so."""
    engine = config.engine
    least = {"compile": compile_modes(engine)[-1], "graphs": "off", "offload_idle": engine.graphs != "on"}
    names = [name for name in least if with_engine(config, {name: least[name]}) != config]
    became = ", ".join(f"engine.{name}=auto is {str(least[name]).lower()}" for name in names)
    tell(f"{became}, because nothing can be planned: {error}")
    return least


def _fixed(config: Config, is_cpu: bool, tell: Callable[[str], None]) -> Batches | None:
    """Returns the numbers that need no plan; None if there are none."""
    # A run that resumes keeps its own, if they still divide.
    if not has_auto(config):
        return batches_of(config)
    if config.resume is not None:
        kept = noted_batches(config, _folder(config))
        if kept is not None and _is_valid(with_batches(config, kept)):
            tell(f"auto: as before, {kept}")
            return kept
    if not is_cpu:
        return None
    found = batches_of(with_numbers(config, parallel.world_size()))
    tell(f"auto: {found} (fixed numbers on a CPU)")
    return found


def _is_valid(config: Config) -> bool:
    try:
        validate(config, parallel.world_size())
    except ValueError:
        return False
    return True


def _memory_gib(config: Config, device: torch.device) -> float:
    """Returns what a run may take of this process's device; infinite on a CPU."""
    if device.type != "cuda":
        return float("inf")
    return config.engine.memory_gib or torch.cuda.get_device_properties(device).total_memory / _GIB
