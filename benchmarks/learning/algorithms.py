"""PPO, REBEL and GRPO at equal queries: compressibility with the detector as its guard.

    python benchmarks/learning/algorithms.py --jobs 2

All three have the same rollouts (64 images), the same two updates on each, and no KL term, whose weight would mean
something else beside each loss. PPO and REBEL take advantages by running statistics of the prompt, GRPO by its group
and the group's own deviation, as its paper has it. Learning rates by a sweep of short runs, the same for each. REBEL
was tried with two etas there, so with twice as many runs; `rebel_tight`, tried first, is in the sweep only.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.learning.arms import TOTAL, Arm, chosen_lrs, run_figure, train_arms, tuned
from benchmarks.learning.summaries import ahead_of, summarise, table, write_curves

_TASK = (
    *("rewards", "[{name: jpeg_compressibility}, {name: shapes_alignment, weight: 0.5}]"),
    *("update.kl_weight", "0", "update.num_updates", "2", "update.micro_batch_size", "48"),
    *("num_iterations", "30", "checkpoint.every", "10", "evaluation.every", "10", "evaluation.num_images", "128"),
)
_GROUPS = ("advantages.kind", "group", "advantages.scale", "group")
_REBEL = ("algorithm.name", "rebel", "algorithm.eta")
_ETAS = {"rebel": "1e-2", "rebel_tight": "1e-3"}  # nats a dimension; 1e-3 is ten times PPO's clip range
_LRS, _TUNING_SHARE = ("5e-5", "1e-4", "2e-4"), 2 / 3


def arms() -> list[Arm]:
    ppo = Arm("ppo", "compressibility", _TASK)
    grpo = Arm("grpo", "compressibility", (*_TASK, "algorithm.name", "grpo", *_GROUPS))
    rebels = [Arm(name, "compressibility", (*_TASK, *_REBEL, eta)) for name, eta in _ETAS.items()]
    return [ppo, grpo, *rebels]


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = tuned(arms(), _LRS, _TUNING_SHARE, arguments)
    lrs = chosen_lrs(chosen)
    del chosen["rebel_tight"]  # is in the sweep only
    curves = train_arms(list(chosen.values()), arguments)
    write_curves(curves, arguments.out, "PPO, GRPO, REBEL")
    print(table(curves, [TOTAL, "eval/jpeg_compressibility/mean", "eval/shapes_alignment/mean"]))
    return {"lr": lrs, "arms": summarise(curves), "ahead_of_ppo": ahead_of(curves, "ppo", TOTAL)}


if __name__ == "__main__":
    sys.exit(run_figure("algorithms", __doc__, draw))
