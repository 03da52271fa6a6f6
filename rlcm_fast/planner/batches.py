"""Chooses the sizes of micro-batches, the largest that the planner says fit together, and what has room beside them.

    update, because it is most of an iteration; then rollout; then decoding, beside what was chosen
    -> what has room beside these, in this order, where it is auto:
       the network compiled whole, else its blocks (engine.compile)
       CUDA graphs (engine.graphs)
       text encoders and VAE that stay on the GPU (engine.offload_idle)

The rest comes last, because smaller micro-batches cost time for sure. A network compiled whole returns all gradients at
once, which needs room; what it saves was not measured, nor what graphs save beside large micro-batches: a GPU that
works on a micro-batch for longer than the host takes to launch it does not wait for launches. Parts that move cost a
copy in each rollout, less than graphs are to save; if they stay, decoding has a graph as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from rlcm_fast.config import Config
from rlcm_fast.config.batches import AUTO, Batches, Candidates, with_batches
from rlcm_fast.planner.estimate import GIB, Strategy
from rlcm_fast.planner.seconds import Planner

SPARE = 0.03
"""Share of a GPU's memory that is left free: tensors on an H200 took up to 3 % more at their peak than planned."""


def choose(planner: Planner, strategy: Strategy, candidates: Candidates, memory_gib: float) -> tuple[Strategy, bool]:
    """Returns the strategy with what was chosen, and whether it fits; if nothing does, the smallest sizes."""
    # Begin with what needs the least memory.
    limit, beside = memory_gib * GIB * (1 - SPARE), _beside(strategy, candidates)
    smallest = Batches(candidates.update[-1], candidates.rollout[-1], candidates.decode[-1])
    chosen = replace(with_sizes(strategy, smallest), **beside[-1])

    def fits(changed: Strategy) -> bool:
        return planner.memory(changed).peak <= limit

    # Choose the sizes, then the most that has room beside them.
    sizes = {
        "micro_batch_size": candidates.update,
        "rollout_micro_batch_size": candidates.rollout,
        "decode_batch_size": candidates.decode,
    }
    for name, wanted in sizes.items():
        larger = (replace(chosen, **{name: size}) for size in wanted)
        chosen = next((changed for changed in larger if fits(changed)), chosen)
    chosen = next((more for more in (replace(chosen, **each) for each in beside) if fits(more)), chosen)
    return chosen, fits(chosen)


def _beside(asked: Strategy, candidates: Candidates) -> list[dict[str, Any]]:
    """Returns what `auto` may be beside the sizes, the best first; the last needs the least memory."""
    modes = candidates.compile if asked.compile == "auto" else (asked.compile,)
    graphs = ("auto", "off") if asked.graphs == "auto" else (asked.graphs,)
    moved = (False, True) if asked.moves_idle == "auto" else (asked.moves_idle,)
    moved = (False,) if asked.graphs == "on" else moved  # they must replay the decoder, too
    names = ("compile", "graphs", "moves_idle")
    return [dict(zip(names, values, strict=True)) for values in product(modes, graphs, moved)]


def choices(planner: Planner, asked: Strategy, chosen: Strategy, candidates: Candidates) -> list[str]:
    """Says what `auto` has become beside the sizes, a line each; of graphs only where there are none."""
    lines = []
    if asked.compile == "auto":
        why = ""
        if chosen.compile != candidates.compile[0]:
            needed = planner.memory(replace(chosen, compile="whole")).peak / GIB
            why = f"; with whole these micro-batches would take {needed:.1f} GiB"
        elif chosen.compile != "whole":
            why = "; the rest of the config does not allow more"
        lines.append(f"engine.compile=auto: {chosen.compile}{why}")
    if asked.moves_idle == "auto" and chosen.moves_idle:
        needed = planner.memory(replace(chosen, moves_idle=False)).peak / GIB
        why = f"if they stayed, these micro-batches would take {needed:.1f} GiB"
        lines.append(f"engine.offload_idle=auto: text encoders and VAE move to the GPU and back; {why}")
    elif asked.moves_idle == "auto":
        lines.append("engine.offload_idle=auto: text encoders and VAE stay on the GPU")
    if asked.graphs == "auto" and chosen.graphs == "off":
        needed = planner.memory(replace(chosen, graphs="auto")).peak / GIB
        lines.append(f"engine.graphs=auto: no graphs, with which these micro-batches would take {needed:.1f} GiB")
    return lines


def with_sizes(strategy: Strategy, batches: Batches) -> Strategy:
    """Returns the strategy with these sizes."""
    rollout, decode = batches.rollout, batches.decode
    return replace(
        strategy, micro_batch_size=batches.update, rollout_micro_batch_size=rollout, decode_batch_size=decode
    )


def chosen_config(config: Config, strategy: Strategy) -> Config:
    """Returns the config with the sizes of a strategy, and with what it has beside them."""
    return with_engine(with_batches(config, sizes_of(strategy)), engine_of(strategy))


def engine_of(strategy: Strategy) -> dict[str, Any]:
    """Returns the fields of `engine` that are chosen beside the sizes."""
    return {"compile": strategy.compile, "graphs": strategy.graphs, "offload_idle": strategy.moves_idle}


def with_engine(config: Config, chosen: Mapping[str, Any]) -> Config:
    """Returns the config with these fields of `engine` where its own are auto."""
    open_fields = {name: value for name, value in chosen.items() if getattr(config.engine, name) == AUTO}
    return replace(config, engine=replace(config.engine, **open_fields))


def sizes_of(strategy: Strategy) -> Batches:
    """Returns the sizes of a strategy."""
    return Batches(strategy.micro_batch_size, strategy.rollout_micro_batch_size, strategy.decode_batch_size)
