"""Chooses the sizes of micro-batches: the largest that the planner says fit together.

update first, because it is most of an iteration; then rollout, then decoding, beside what was chosen
"""

from __future__ import annotations

from dataclasses import replace

from rlcm_fast.config.batches import Batches, Candidates
from rlcm_fast.planner.estimate import GIB, Strategy
from rlcm_fast.planner.seconds import Planner

SPARE = 0.03
"""Share of a GPU's memory that is left free: tensors on an H200 took up to 3 % more at their peak than planned."""


def choose(planner: Planner, strategy: Strategy, candidates: Candidates, memory_gib: float) -> tuple[Batches, bool]:
    """Returns the sizes, and whether they fit; if nothing does, the smallest."""
    limit = memory_gib * GIB * (1 - SPARE)
    chosen = with_sizes(strategy, Batches(candidates.update[-1], candidates.rollout[-1], candidates.decode[-1]))

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
    return sizes_of(chosen), fits(chosen)


def with_sizes(strategy: Strategy, batches: Batches) -> Strategy:
    """Returns the strategy with these sizes."""
    rollout, decode = batches.rollout, batches.decode
    return replace(
        strategy, micro_batch_size=batches.update, rollout_micro_batch_size=rollout, decode_batch_size=decode
    )


def sizes_of(strategy: Strategy) -> Batches:
    """Returns the sizes of a strategy."""
    return Batches(strategy.micro_batch_size, strategy.rollout_micro_batch_size, strategy.decode_batch_size)
