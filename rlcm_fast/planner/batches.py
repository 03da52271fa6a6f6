"""Chooses the sizes of micro-batches, the largest that the planner says fit together, and whether graphs replay them.

update first, because it is most of an iteration; then rollout, then decoding, beside what was chosen; then graphs, if
engine.graphs is auto and what they keep fits beside all that

Graphs come last, because smaller micro-batches cost time for sure, and what graphs save beside large ones was not
measured: a GPU that works on a micro-batch for longer than the host takes to launch it does not wait for launches.
"""

from __future__ import annotations

from dataclasses import replace

from rlcm_fast.config import Config
from rlcm_fast.config.batches import Batches, Candidates, with_batches
from rlcm_fast.planner.estimate import GIB, Strategy
from rlcm_fast.planner.seconds import Planner

SPARE = 0.03
"""Share of a GPU's memory that is left free: tensors on an H200 took up to 3 % more at their peak than planned."""


def choose(planner: Planner, strategy: Strategy, candidates: Candidates, memory_gib: float) -> tuple[Strategy, bool]:
    """Returns the strategy with what was chosen, and whether it fits; if nothing does, the smallest sizes."""
    limit, is_open = memory_gib * GIB * (1 - SPARE), strategy.graphs == "auto"
    smallest = Batches(candidates.update[-1], candidates.rollout[-1], candidates.decode[-1])
    chosen = replace(with_sizes(strategy, smallest), graphs="off" if is_open else strategy.graphs)

    def fits(changed: Strategy) -> bool:
        return planner.memory(changed).peak <= limit

    sizes = {
        "micro_batch_size": candidates.update,
        "rollout_micro_batch_size": candidates.rollout,
        "decode_batch_size": candidates.decode,
    }
    for name, wanted in sizes.items():
        larger = (replace(chosen, **{name: size}) for size in wanted)
        chosen = next((changed for changed in larger if fits(changed)), chosen)
    graphed = replace(chosen, graphs=strategy.graphs)
    chosen = graphed if fits(graphed) else chosen
    return chosen, fits(chosen)


def without_graphs(planner: Planner, chosen: Strategy) -> str:
    """Says why engine.graphs=auto uses none beside the chosen sizes."""
    needed = planner.memory(replace(chosen, graphs="auto")).peak / GIB
    return f"engine.graphs=auto: no graphs, with which these micro-batches would take {needed:.1f} GiB"


def with_sizes(strategy: Strategy, batches: Batches) -> Strategy:
    """Returns the strategy with these sizes."""
    rollout, decode = batches.rollout, batches.decode
    return replace(
        strategy, micro_batch_size=batches.update, rollout_micro_batch_size=rollout, decode_batch_size=decode
    )


def chosen_config(config: Config, strategy: Strategy) -> Config:
    """Returns the config with the sizes and the graphs of a strategy."""
    config = with_batches(config, sizes_of(strategy))
    return replace(config, engine=replace(config.engine, graphs=strategy.graphs))


def sizes_of(strategy: Strategy) -> Batches:
    """Returns the sizes of a strategy."""
    return Batches(strategy.micro_batch_size, strategy.rollout_micro_batch_size, strategy.decode_batch_size)
