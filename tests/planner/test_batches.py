"""What is chosen beside the micro-batches, from the most memory to the least."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from planners import SHAPES, planner_of

from rlcm_fast.config import parse_config
from rlcm_fast.config.batches import Batches, Candidates, with_numbers
from rlcm_fast.config.resolved import resolve
from rlcm_fast.planner.batches import SPARE, choices, choose, sizes_of
from rlcm_fast.planner.estimate import GIB, Strategy, strategy_of
from rlcm_fast.planner.seconds import Planner
from rlcm_fast.planner.workload import Workload

PURE = ["--engine.dtype=pure_bf16", "--optimizer.name=adamw_8bit", "--update.micro_batch_size=32"]
OPEN = [*PURE, "--engine.graphs=auto", "--engine.offload_idle=auto"]


def asked(*options: str) -> tuple[Planner, Strategy, Candidates]:
    config = parse_config([*options, "--rollout.decode_batch_size=4"])
    numbered = with_numbers(config, 1)
    planner = planner_of(SHAPES, Workload.of(resolve(numbered, 1)))
    return planner, strategy_of(numbered), Candidates.of(config, 1)


def room_for(planner: Planner, strategy: Strategy) -> float:
    """GiB of a GPU on which exactly this fits."""
    return planner.memory(strategy).peak * 1.0001 / GIB / (1 - SPARE)


def test_what_needs_more_memory_is_dropped_in_the_order_of_its_worth():
    planner, strategy, candidates = asked(*OPEN)
    expected: list[dict[str, Any]] = [
        {"compile": "whole", "graphs": "auto", "moves_idle": False},
        {"compile": "whole", "graphs": "auto", "moves_idle": True},
        {"compile": "whole", "graphs": "off", "moves_idle": False},
        {"compile": "whole", "graphs": "off", "moves_idle": True},
        {"compile": "regional", "graphs": "off", "moves_idle": True},
    ]
    for values in expected:
        wanted = replace(strategy, **values)
        chosen, fits = choose(planner, strategy, candidates, room_for(planner, wanted))
        assert fits and chosen == wanted
    chosen, fits = choose(planner, strategy, candidates, 0.5)
    assert not fits and chosen == replace(strategy, **expected[-1])


def test_the_network_is_compiled_whole_only_where_no_micro_batch_is_smaller_for_it():
    options = ["--update.micro_batch_size=auto", "--rollout.micro_batch_size=auto", *PURE[:2]]
    planner, strategy, candidates = asked(*options)
    modes = set[str]()
    regional = replace(candidates, compile=("regional",))
    for gib in (1.25, 1.3, 1.35, 1.4, 1.5, 2.0):
        chosen, _ = choose(planner, strategy, candidates, gib)
        assert sizes_of(chosen) == sizes_of(choose(planner, strategy, regional, gib)[0])
        modes.add(chosen.compile)
    assert "whole" in modes
    assert sizes_of(choose(planner, strategy, candidates, 2.0)[0]) == Batches(64, 64, 4)


@pytest.mark.parametrize(
    ("more", "mode", "why"),
    [
        ([], "whole", ""),
        (["--engine.zero_stage=3", "--engine.dtype=fp32", "--optimizer.name=adamw"], "off", "; the rest"),
        (["--engine.optimizer_in_backward=true", "--update.micro_batch_size=192"], "regional", "; the rest"),
    ],
)
def test_auto_compiles_what_the_rest_of_the_config_allows(more: list[str], mode: str, why: str):
    planner, strategy, candidates = asked(*PURE, *more)
    chosen, _ = choose(planner, strategy, candidates, 24.0)
    assert chosen.compile == mode
    (line,) = choices(planner, strategy, chosen, candidates)
    assert line == f"engine.compile=auto: {mode}" + (f"{why} of the config does not allow more" if why else "")


def test_a_plan_says_how_much_a_network_compiled_whole_would_take():
    planner, strategy, candidates = asked(*PURE)
    regional, whole = (replace(strategy, compile=mode) for mode in ("regional", "whole"))
    chosen, _ = choose(planner, strategy, candidates, room_for(planner, regional))
    assert chosen == regional
    needed = planner.memory(whole).peak / GIB
    assert choices(planner, strategy, chosen, candidates) == [
        f"engine.compile=auto: regional; with whole these micro-batches would take {needed:.1f} GiB"
    ]
