"""What the planner suggests: train.py takes it with the rest of the config, and it fits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planners import SHAPES, planner_of

from rlcm_fast.config import Config, parse_config
from rlcm_fast.config.batches import batches_of, with_numbers
from rlcm_fast.config.checks import validate
from rlcm_fast.planner.estimate import GIB, SETTINGS, strategy_of
from rlcm_fast.planner.gpus import GPUS, Gpu
from rlcm_fast.planner.remedies import LADDER, Remedies, with_settings
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.workload import Workload

CONFIGS = sorted(Path("configs").glob("*/*.yaml"))
FULL_SIZE = [file for file in CONFIGS if re.search(r"^  path: (?!shapes/)", file.read_text(), re.MULTILINE)]
MORE = {
    "plain": [],
    "one_micro_batch": ["--update.micro_batch_size=192", "--update.kl_weight=0.1"],
    "in_backward": [
        "--engine.optimizer_in_backward=true",
        "--optimizer.name=adamw_8bit",
        "--update.micro_batch_size=192",
        "--engine.channels_last=true",
    ],
    "channels_last": ["--engine.channels_last=true"],
    "stage_3": ["--engine.zero_stage=3"],
    "lora": ["--lora.rank=4", "--engine.dtype=pure_bf16"],
    "average": ["--ema.decay=0.9"],
    "pairs": ["--pretraining.data=shapes:one", "--pretraining.weight=1", "--update.kl_weight=0"],
}


def gpu_of(gib: float) -> Gpu:
    return replace(GPUS["rtx4090"], name="small", memory_gib=gib)


def suggested(arguments: Sequence[str], model: str, gib: float, processes: int = 1) -> tuple[Config, Any, Planner]:
    """The config, what to change of it, and its planner."""
    config = parse_config(arguments)
    planner = planner_of(model, Workload.of(validate(config, processes)))
    return config, Remedies(planner, config, config.model.pixels, gpu_of(gib)).cheaper(), planner


def assert_is_a_remedy(arguments: Sequence[str], model: str, gib: float, processes: int = 1) -> bool:
    """Parsed as a user would type it; False where nothing was suggested."""
    config, settings, planner = suggested(arguments, model, gib, processes)
    size = config.model.pixels
    if settings is None:
        assert not planner.fits(strategy_of(config, size), gpu_of(gib))
        return False
    changed = parse_config([*arguments, *(f"--{field}={str(value).lower()}" for field, value in settings.items())])
    validate(changed, processes)
    assert changed == with_settings(config, settings)
    assert planner.fits(strategy_of(changed, size), gpu_of(gib))
    for field in settings:  # none of them is for nothing
        fewer = with_settings(config, {other: value for other, value in settings.items() if other != field})
        assert not (is_valid(fewer, processes) and planner.fits(strategy_of(fewer, size), gpu_of(gib))), field
    return True


def is_valid(config: Config, processes: int) -> bool:
    try:
        validate(config, processes)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", MORE)
def test_what_is_suggested_is_accepted_and_fits_and_none_of_it_is_for_nothing(name: str):
    found = [assert_is_a_remedy(MORE[name], SHAPES, gib) for gib in (1.26, 1.35)]
    assert all(found)


@pytest.mark.parametrize("file", [file for file in CONFIGS if file not in FULL_SIZE], ids=str)
def test_so_it_is_for_the_configs_of_the_shipped_model(file: Path):
    found = [assert_is_a_remedy([f"--config={file}"], SHAPES, gib) for gib in (1.26, 1.3)]
    assert all(found)


@pytest.mark.slow
@pytest.mark.parametrize("file", FULL_SIZE, ids=str)
def test_so_it_is_for_full_size_models(file: Path):
    """On GPUs of the table's sizes, and smaller and in-between ones; some of them are too small for anything."""
    config, gibs, found = parse_config([f"--config={file}"]), (8, 12, 16, 20, 24, 32, 40), []
    for processes in (n for n in (1, 8) if is_valid(config, n)):
        sizes = str(batches_of(with_numbers(config, processes))).split(", ")  # where the config says auto, too
        arguments = [f"--config={file}", *(f"--{size}" for size in sizes)]
        found += [assert_is_a_remedy(arguments, config.model.path, gib, processes) for gib in gibs]
    assert sum(found) > len(found) / 2


def test_a_micro_batch_that_does_not_fit_ends_the_optimizer_in_the_backward_pass():
    """It needs an update of one micro-batch, so smaller ones and the optimizer after the backward pass are said."""
    _, settings, _ = suggested(MORE["in_backward"], SHAPES, 1.26)
    assert settings is not None
    assert settings["engine.optimizer_in_backward"] is False
    assert settings["update.micro_batch_size"] < 192


def test_a_start_model_that_the_gpu_has_no_room_for_waits_in_the_cpus_memory():
    cheaper = ["--update.micro_batch_size=1", "--rollout.decode_batch_size=1", "--engine.offload_idle=true"]
    arguments = ["--algorithm.name=dpok", "--update.kl_weight=0.1", *cheaper]
    config, _, planner = suggested(arguments, SHAPES, 24)
    offloaded = strategy_of(with_settings(config, {"update.kl_reference": "offload"}), None)
    needed = planner.memory(offloaded).peak
    assert needed < planner.memory(strategy_of(config, None)).peak
    assert suggested(arguments, SHAPES, needed / GIB)[1] == {"update.kl_reference": "offload"}


def test_where_nothing_helps_none_is_said():
    assert suggested([], SHAPES, 1.0)[1] is None


GRAPHS = ["--engine.graphs=auto", "--engine.compile=whole"]


def test_every_step_of_the_ladder_is_of_the_config_and_known_to_the_estimate():
    config = parse_config(["--engine.zero_stage=2", "--optimizer.name=adam", "--update.kl_weight=1", *GRAPHS])
    config = with_settings(config, {"engine.channels_last": True})
    for step in LADDER:
        known = {*SETTINGS, "update.kl_weight", "update.kl_reference", "engine.channels_last", "guard.action"}
        assert set(step) <= known
        assert strategy_of(with_settings(config, step)) != strategy_of(config)
