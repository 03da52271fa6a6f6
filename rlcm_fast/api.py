"""Fine-tuning from Python: `rlcm_fast.fine_tune` in a script or a notebook, in this one process.

It is the command line in other words: the same config, the same checks with the same lines, the same loop and the same
run folder. What a run changes about its process, it puts back at the end: signal handlers, environment, warnings'
filters, random numbers, torch's process group. So a program may call it again, whatever became of the first call.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlcm_fast.train import checked, set_process_environment

if TYPE_CHECKING:
    from rlcm_fast.config import Config, PromptsConfig
    from rlcm_fast.given import Given
    from rlcm_fast.handover import Handover

_ONE_AT_A_TIME = threading.Lock()  # a run has the process's signals, environment and process group
_ARGUMENTS = {"model__path": "as the first argument", "prompts__source": "as prompts"}
_MAY_HOLD_OBJECTS = ("evaluation__rewards", "evaluation__prompts")


@dataclass(frozen=True)
class Run:
    """A run that has ended, and what it left in its folder."""

    config: Config
    """The config, as in run_dir/config.yaml."""
    is_finished: bool
    """Whether it ended by itself or by the callback, or a guard stopped it that exported the best checkpoint.

    False if Ctrl-C stopped it, then resume="latest" goes on; or a guard before there was a best checkpoint.
    """

    metrics: list[dict[str, Any]]
    """The metrics of each iteration, and those of the last evaluation; docs/runs.md explains the keys."""

    def __repr__(self) -> str:
        return f"Run(run_dir={str(self.run_dir)!r}, is_finished={self.is_finished})"

    @property
    def run_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.run_dir)

    @property
    def lora(self) -> Path | None:
        """The folder of the trained adapters, for `load_lora_weights`, ComfyUI and A1111; None if there are none."""
        return self.run_dir / "lora" if self.is_finished and self.config.lora.rank > 0 else None

    @property
    def weights(self) -> Path | None:
        """The trained weights alone, those of the newest checkpoint; None without a checkpoint.

        After a guard's stop those of the best one before it, which is the one that is exported, if there is any.
        """
        from rlcm_fast.run_folder.best import Best
        from rlcm_fast.run_folder.checkpoint import complete

        folders = complete(self.run_dir)
        if self.is_finished and self.metrics and self.metrics[-1].get("guard/stopped"):
            best = Best.find(self.run_dir)
            folders += [best.folder(self.run_dir)] if best else []
        name = "adapters.safetensors" if self.config.lora.rank > 0 else "unet.safetensors"
        return folders[-1] / name if folders else None

    @cached_property
    def pipeline(self) -> Any:
        """The tuned diffusers pipeline on the CPU, in float32; loaded when it is first asked for.

        It has the exported weights, or those of the newest checkpoint of a run that was stopped.

        Raises:
            ValueError: the run was stopped before its first checkpoint.
        """
        import torch

        from rlcm_fast.backbones.assembly import load_pipeline
        from rlcm_fast.run_folder.formats import FinishedRun

        if self.is_finished:
            export = str(self.run_dir / "export")
            return load_pipeline(export, None, torch.float32, f"export={export}")
        backbone, weights = FinishedRun.find(str(self.run_dir), None).load()
        return backbone.with_weights(weights)


def fine_tune(
    pipeline_or_path: Any = None,
    /,
    rewards: Iterable[Any] | None = None,
    prompts: Any = None,
    config: str | Path | None = None,
    callback: Callable[[int, Mapping[str, Any]], Any] | None = None,
    **overrides: Any,
) -> Run:
    """Fine-tunes a text-to-image model on rewards, and returns when the run has ended.

    pipeline_or_path    a diffusers pipeline, which stays as it is and is saved into the run's folder first; or what
                        model.path accepts: a folder, a .safetensors file, a hub id, shapes/lcm
    rewards             a list of names (as jpeg_compressibility), functions, objects or classes, each alone, with its
                        weight as (reward, 4.0), or as a mapping like an entry of the YAML's list. A function gets
                        images (B, 3, H, W) in [0, 1] and a list of B texts, and returns B scores; an object with a
                        `scope` follows the protocol of docs/rewards.md
    prompts             a list of texts, a function that returns one, or what prompts.source accepts. Evaluations draw
                        these, too, unless evaluation__prompts names others. A list that is shorter than an iteration
                        gets more images of each prompt, as many in all, unless the overrides say how many
    config              a YAML file or the name of a shipped config; the arguments override it
    callback            is called with the number of each finished iteration and its metrics; if it returns True, the
                        run ends with a checkpoint and an export
    overrides           fields of the config: optimizer__lr=5e-5 for optimizer.lr, and run_dir, num_iterations, seed

    Ctrl-C saves a checkpoint and returns; with resume="latest" the same call goes on.

    Raises:
        ValueError: a mistake in the arguments, in one line, before any weights load.
        Fault: something went wrong in a reward, the data or the numbers; the finished iterations are saved.
    """
    # Find mistakes in the config alone, before torch is imported and before anything is written.
    from rlcm_fast import quiet
    from rlcm_fast.config import config_of

    file = None if config is None else str(config)
    _check_keywords(overrides)
    plain = {keyword: value for keyword, value in overrides.items() if keyword not in _MAY_HOLD_OBJECTS}
    start = config_of(file, plain)
    if start.dry_run:
        raise ValueError("dry_run=true trains nothing; leave it out, or use train.py, which prints the plan")

    # Turn objects into fields, check the whole, and train.
    path = str(pipeline_or_path) if isinstance(pipeline_or_path, str | Path) else None
    named = {"model__path": path, "rewards": rewards, "prompts__source": prompts, "evaluation__prompts": prompts}
    named = {keyword: value for keyword, value in named.items() if value is not None} | overrides
    fitting = _fitting(start.prompts, prompts, overrides)
    with _environment_as_before():
        quiet.hush_libraries(start.debug)  # before the first of them is imported
        from rlcm_fast.config.checks import validate
        from rlcm_fast.given import Given
        from rlcm_fast.handover import Handover
        from rlcm_fast.terminal import write_line

        handover = Handover(Path(start.run_dir))
        whole = config_of(file, _fields_of(fitting | named, handover))
        validate(whole, world_size=1)
        if fitting:
            write_line(", ".join(f"{keyword}={value}" for keyword, value in fitting.items()) + ": for few prompts")
        given = Given(handover.rewards, is_enough=_asks(callback), is_hosted=True)
        return run_here(whole, given, handover, pipeline_or_path if path is None else None)


def run_here(config: Config, given: Given, handover: Handover, pipeline: Any = None) -> Run:
    """Trains in this process and leaves it as it was; raises what `fine_tune` raises.

    pipeline: in memory, the model to train; None takes that of the config.
    """
    from rlcm_fast.run_folder.progress import free_memory

    if not _ONE_AT_A_TIME.acquire(blocking=False):
        raise ValueError("a run is training in this process already; wait for its end, or start another process")
    try:
        with _process_of_its_own():
            return _train(config, given, handover, pipeline)
    except BaseException as error:
        free_memory(error)  # a notebook keeps the traceback, and with it what its frames hold
        raise
    finally:
        _ONE_AT_A_TIME.release()


def _train(config: Config, given: Given, handover: Handover, pipeline: Any) -> Run:
    from rlcm_fast.run_folder import lock as locks
    from rlcm_fast.run_folder.resume import check_run_dir
    from rlcm_fast.run_folder.tracking import say

    # Take the folder before anything is written into it; the trainer takes it over.
    check_run_dir(config)
    lock = locks.take(Path(config.run_dir), say)
    try:
        with handover.taken_back_if_refused():
            handover.write()
            if pipeline is not None:
                config = replace(config, model=replace(config.model, path=handover.keep_pipeline(pipeline)))
            checked(config, 1, given)
        from rlcm_fast.trainer import Trainer

        trainer = Trainer(config, given)
        is_finished = trainer.run()
    finally:
        lock.release()
    lines = [json.loads(line) for line in (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()]
    return Run(trainer.config, is_finished, list({line["iteration"]: line for line in lines}.values()))


def _check_keywords(overrides: Mapping[str, Any]) -> None:
    for keyword, way in _ARGUMENTS.items():
        if keyword in overrides:
            raise ValueError(f"{keyword} is given {way}; write it there")


def _fitting(config: PromptsConfig, prompts: Any, overrides: Mapping[str, Any]) -> dict[str, int]:
    """Returns how many prompts an iteration draws from a list that is shorter, and how many images of each."""
    counts = ("prompts__num_prompts", "prompts__images_per_prompt")
    is_list = isinstance(prompts, list | tuple) and 0 < len(prompts) < config.num_prompts
    if not is_list or any(keyword in overrides for keyword in (*counts, "tasks")):
        return {}
    num_images = config.num_prompts * config.images_per_prompt
    num_prompts = max(number for number in range(1, len(prompts) + 1) if num_images % number == 0)
    return dict(zip(counts, (num_prompts, num_images // num_prompts), strict=True))


def _fields_of(named: Mapping[str, Any], handover: Handover) -> dict[str, Any]:
    """Returns keywords whose objects are replaced by what the config says of them."""
    fields = dict(named)
    for keyword, shown in (("rewards", "rewards"), ("evaluation__rewards", "evaluation.rewards")):
        if keyword in fields:
            fields[keyword] = handover.entries(fields[keyword], shown)
    for keyword, shown in (("prompts__source", "prompts"), ("evaluation__prompts", "evaluation.prompts")):
        if keyword in fields:
            fields[keyword] = handover.source(fields[keyword], shown)
    return fields


def _asks(callback: Callable[[int, Mapping[str, Any]], Any] | None) -> Callable[[int, Mapping[str, Any]], bool]:
    """Returns whether the callback wants an end: True itself, because many functions return something."""
    if callback is None:
        return lambda iteration, metrics: False
    return lambda iteration, metrics: callback(iteration, metrics) is True


@contextlib.contextmanager
def _process_of_its_own() -> Iterator[None]:
    """Makes this process a run of one; everything that the run changes about it is put back afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']}: fine_tune trains in one process; for several write the config "
            "into a file and start deepspeed rlcm_fast/train.py --config FILE"
        )
    import torch
    import torch.distributed as dist

    from rlcm_fast.kernels import dispatch

    is_joined, hook = dist.is_initialized(), sys.excepthook
    with _environment_as_before(), torch.random.fork_rng(_gpus()), dispatch.use("auto"), _deterministic_as_before():
        try:
            set_process_environment()
            yield
        finally:
            if dist.is_initialized() and not is_joined:
                import deepspeed.comm

                deepspeed.comm.destroy_process_group()
            sys.excepthook = hook  # torch's puts [rank0] in front of every line


@contextlib.contextmanager
def _environment_as_before() -> Iterator[None]:
    """Puts back the environment's variables and the warnings' filters."""
    environment = dict(os.environ)
    with warnings.catch_warnings():
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)


def _gpus() -> list[int]:
    """Returns the GPU whose random numbers a run draws from."""
    import torch

    return [int(os.environ.get("LOCAL_RANK", "0"))] if torch.cuda.is_available() else []


@contextlib.contextmanager
def _deterministic_as_before() -> Iterator[None]:
    """Puts back what engine.deterministic sets."""
    import torch

    algorithms = torch.are_deterministic_algorithms_enabled()
    cudnn: Any = torch.backends.cudnn
    deterministic, benchmark = cudnn.deterministic, cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(algorithms)
        cudnn.deterministic, cudnn.benchmark = deterministic, benchmark
