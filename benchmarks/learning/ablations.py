"""Ablations on compressibility with the detector as its guard, each one change to `base`.

    python benchmarks/learning/ablations.py --jobs 2

    base        the last, deterministic step is no action; one update a rollout
    renoise     the RLCM paper's code: the last action noises an image that is thrown away, and is trained too
    sampled     the last step is an action that draws the image itself, with a sigma of 0.1 in the latent
    sensitivity each step's loss divided by B / sigma, what its mean moves by the network's output
    updates_2   two updates a rollout, on half of its transitions each
    updates_4   four
    group       advantages within the images of a prompt in the batch
    group_shared_noise   that, and all images of a prompt start from the same noise

at equal queries; learning rates by a sweep of short runs, the same for each.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from benchmarks.learning.arms import TOTAL, Arm, chosen_lrs, run_figure, train_arms, tuned
from benchmarks.learning.summaries import ahead_of, summarise, table, write_curves

_TASK = (
    *("rewards", "[{name: jpeg_compressibility}, {name: shapes_alignment, weight: 0.5}]"),
    *("update.kl_weight", "0", "update.micro_batch_size", "48"),
    *("num_iterations", "24", "checkpoint.every", "8", "evaluation.every", "8", "evaluation.num_images", "128"),
)
_LRS, _TUNING_SHARE = ("1e-4", "2e-4"), 1 / 2


def arms() -> list[Arm]:
    changes = {
        "base": (),
        "renoise": ("policy.last_step", "renoise", "update.micro_batch_size", "64"),
        "sampled": ("policy.last_step", "sampled", "update.micro_batch_size", "64"),
        "sensitivity": ("update.step_weights", "sensitivity"),
        "updates_2": ("update.num_updates", "2"),
        "updates_4": ("update.num_updates", "4"),
        "group": ("advantages.kind", "group"),
        "group_shared_noise": ("advantages.kind", "group", "rollout.shared_noise", "true"),
    }
    return [Arm(name, "compressibility", (*_TASK, *change)) for name, change in changes.items()]


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    chosen = tuned(arms(), _LRS, _TUNING_SHARE, arguments)
    curves = train_arms(list(chosen.values()), arguments)
    write_curves(curves, arguments.out, "ablations")
    print(table(curves, [TOTAL, "eval/jpeg_compressibility/mean", "eval/shapes_alignment/mean"]))
    ahead = ahead_of(curves, "base", TOTAL)
    return {"lr": chosen_lrs(chosen), "arms": summarise(curves), "ahead_of_base": ahead}


if __name__ == "__main__":
    sys.exit(run_figure("ablations", __doc__, draw))
