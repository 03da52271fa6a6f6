"""What keeps pictures real where nothing in the reward does: KL to the start model, L_pre, both or neither.

    python benchmarks/learning/realism.py --jobs 2

JPEG size is the only reward, the one that paints every image blank. Watched on held-out captions, by no reward trained
on: the detector's confidence that there is a shape, its score of the caption, and minus the energy distance to renders
of the same captions (rlcm_fast/shapes/realism.py). The picture has them against the reward: an arm that holds pictures
better is higher at the same size; the table is of the smallest size that all of them reach. Last, what each arm paints
after training, seed 0. Learning rates by a sweep of short runs, the same for each arm; the KL term has the weight of
compressibility.yaml, L_pre one at which its first gradient (norm 0.21) is about as long as the reward's (0.16).
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.learning.arms import Arm, Curves, chosen_lrs, run_figure, train_arms, tuned
from benchmarks.learning.exports import picture_arms
from benchmarks.learning.summaries import markdown, named, reaches, short_name, summarise, table, write_curves
from benchmarks.shared.figures import save_figure
from benchmarks.shared.reporting import mean_and_error
from benchmarks.shared.training_runs import Row, at, evaluated

_REWARD = "eval/jpeg_compressibility/mean"
_WATCHED = ("rlcm_fast.shapes.realism:DetectorConfidence", "rlcm_fast.shapes.realism:RenderDistance")
_REAL = ("eval/shapes_alignment/mean", *(f"eval/{name}/mean" for name in _WATCHED))
_TASK = (
    *("rewards", "[{name: jpeg_compressibility}]", "update.kl_weight", "0"),
    *("num_iterations", "40", "checkpoint.every", "10", "evaluation.every", "5", "evaluation.num_images", "128"),
    *("evaluation.rewards", f"[{{name: '{_WATCHED[0]}'}}, {{name: '{_WATCHED[1]}'}}]"),
    *("evaluation.micro_batch_size", "128"),  # a caption's renders are numbered within a call
)
_KL = ("update.kl_weight", "0.06")
_L_PRE = ("pretraining.data", "shapes:one", "pretraining.weight", "1")
_LRS, _TUNING_SHARE = ("5e-5", "1e-4", "2e-4"), 1 / 2


def arms() -> list[Arm]:
    changes = {"neither": (), "kl": _KL, "l_pre": _L_PRE, "both": (*_KL, *_L_PRE)}
    return [Arm(name, "compressibility", (*_TASK, *change)) for name, change in changes.items()]


def draw(arguments: argparse.Namespace) -> dict[str, Any]:
    # Train the arms, each at its best rate.
    chosen = tuned(arms(), _LRS, _TUNING_SHARE, arguments)
    trained = list(chosen.values())
    curves = train_arms(trained, arguments)

    # Draw curves, what is watched against the reward, and what each arm paints.
    write_curves(curves, arguments.out, "what keeps pictures real")
    plot_against_reward(curves, arguments)
    picture_arms(trained, arguments, "shapes:one:held_out", 8)

    # Compare the arms where all have come equally far.
    print(table(curves, [_REWARD, *_REAL]))
    level = common_level(curves)
    there = at_equal_reward(curves, level)
    lines = [named(name, found) for name, found in there.items()]
    print(markdown(["arm", *map(short_name, _REAL)], lines))
    lrs = chosen_lrs(chosen)
    return {"lr": lrs, "arms": summarise(curves), "level": level, "where_the_reward_is_at_the_level": there}


def common_level(curves: Curves) -> float:
    """The highest reward that every seed of every arm attains."""
    highest = []
    for rows in itertools.chain(*curves.values()):
        highest.append(max(row[_REWARD] for row in evaluated(rows, _REWARD)))
    return min(highest)


def at_equal_reward(curves: Curves, level: float) -> dict[str, dict[str, Any]]:
    """arm -> what is watched where the reward first attains `level`, as every seed does."""
    result = {}
    for name, seeds in curves.items():
        result[name] = {metric: mean_and_error(_at_level(seeds, metric, level)) for metric in _REAL}
    return result


def _at_level(seeds: Sequence[Sequence[Row]], metric: str, level: float) -> list[float]:
    """The metric of each seed where its reward first attains `level`."""
    found = []
    for rows in seeds:
        place = reaches(rows, _REWARD, level, "queries")
        if place is not None:
            found.append(at(rows, metric, "queries", place))
    return found


def plot_against_reward(curves: Curves, arguments: argparse.Namespace) -> None:
    """OUT_against_reward.png: what is watched against the reward, a line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # A column for each metric; an arm has one colour.
    figure, axes = pyplot.subplots(1, len(_REAL), figsize=(4.5 * len(_REAL), 4))
    for axis, metric in zip(axes, _REAL, strict=True):
        for number, (name, seeds) in enumerate(curves.items()):
            for rows in seeds:
                points = evaluated(rows, metric)
                xs = [point[_REWARD] for point in points]
                ys = [point[metric] for point in points]
                label = name if rows is seeds[0] else None
                axis.plot(xs, ys, ".-", color=f"C{number}", label=label)
        axis.set(xlabel="minus kB", ylabel=short_name(metric))
        axis.grid(alpha=0.3)

    # The legend; a picture beside the curves'.
    axes[0].legend(fontsize="small")
    save_figure(figure, arguments.out.with_name(f"{arguments.out.name}_against_reward.png"))


if __name__ == "__main__":
    sys.exit(run_figure("realism", __doc__, draw))
