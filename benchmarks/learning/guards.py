"""What guards see, whether raise_kl holds pictures, and what normalising rewards of several scales does.

    python benchmarks/learning/guards.py collapse --jobs 2    # queries at which each guard speaks, and false alarms
    python benchmarks/learning/guards.py raise_kl --jobs 2    # compressibility_paper.yaml, held by the guard alone
    python benchmarks/learning/guards.py combine --jobs 2     # sum against normalised, scales 1, 10, 100

All on ShapesWorld. Each part writes benchmarks/results/guards/PART.json and prints it. "Payload" is the size of a JPEG
minus that of a flat image (0.69 kB), relative to the start. The detector's score is on held-out captions. A run that is
finished is not repeated, one that was cut off goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.learning.arms import Arm, run_folder
from benchmarks.learning.held_pictures import (
    DETECTOR,
    FLAT_KB,
    ITERATIONS,
    LEARNING,
    MEASUREMENTS,
    by_caption,
    held_arm,
    on_other_images,
    raise_kl,
)
from benchmarks.shared.reporting import ROOT, mean_and_error, print_summary
from benchmarks.shared.training_runs import Row, add_seed_arguments, train_all

_OFTEN = ("guard.every", "2", "evaluation.num_images", "128", "evaluation.every", "12", "checkpoint.every", "8")
_COLLAPSE = Arm("collapse", "compressibility_paper", ("guard.action", "warn", *_OFTEN, "num_iterations", "40"))
_HEALTHY = (
    Arm("compressibility", "compressibility", ("guard.action", "warn", *_OFTEN, "num_iterations", "48")),
    Arm("alignment", "alignment", ("guard.action", "warn", *_OFTEN, "guard.every", "6", "num_iterations", "36")),
)
_SHORT = ("evaluation.every", "16", "evaluation.num_images", "256", "num_iterations", "32", "checkpoint.every", "8")
_SCALES = (1, 10, 100)
_SUM, _NORMALISED = "sum, scale", "normalised, scale"


class Compressibility:
    """Minus the JPEG's size in kB times `scale`: the same reward in other units."""

    scope = "image"

    def __init__(self, scale: float = 1.0) -> None:
        self._scale = scale

    def __call__(self, images: Tensor, prompts: Sequence[Any]) -> Tensor:
        """Returns (B,) float32."""
        from rlcm_fast.rewards.jpeg import jpeg_kilobytes

        return -self._scale * jpeg_kilobytes(images, 95)


def combined_arms() -> list[Arm]:
    """Returns arms of two rewards of equal weight, one of them in three units, summed and normalised."""
    arms: list[Arm] = []
    for scale in _SCALES:
        size = f"{{name: 'benchmarks.learning.guards:Compressibility', label: size, arguments: {{scale: {scale}}}}}"
        rewards = ("rewards", f"[{size}, {{name: shapes_alignment}}]", "tracking.reward_gradients_every", "8")
        summed = Arm(f"{_SUM} {scale}", "compressibility", (*_SHORT, *rewards))
        normalised = replace(summed, name=f"{_NORMALISED} {scale}").but("rewards_combine", "normalised")
        arms += [summed, normalised]
    return arms


def collapse(runs: Mapping[str, list[list[Row]]]) -> dict[str, Any]:
    """When each guard first spoke, in queries; the start of the collapse is the first measurement outside of it all."""
    spoken: dict[str, dict[str, list[int | None]]] = {}
    for arm, seeds in runs.items():
        names = {name for rows in seeds for row in rows for name in _banded(row)}
        spoken[arm] = {name: [first_outside(rows, name) for rows in seeds] for name in sorted(names)}
    starts = [start_of_collapse(rows) for rows in runs[_COLLAPSE.name]]
    blank = [first_below(rows, DETECTOR, 0.05) for rows in runs[_COLLAPSE.name]]
    return {"first_outside": spoken, "start_of_collapse": starts, "blank": blank}


def start_of_collapse(rows: Sequence[Row]) -> int | None:
    """Returns the queries at which the detector last was at 95 % of its start or above."""
    first = rows[0][DETECTOR]
    good = [row["seen"] for row in rows if row.get(DETECTOR, 0.0) >= 0.95 * first]
    return max(good) if good else None


def first_below(rows: Sequence[Row], key: str, level: float) -> int | None:
    return next((row["seen"] for row in rows if key in row and row[key] < level), None)


def first_outside(rows: Sequence[Row], name: str) -> int | None:
    """Returns the queries at which a measure was first outside of its band; None if it never was."""
    for row in rows:
        value = row.get(f"guard/{name}")
        low, high = row.get(f"guard/{name}/low"), row.get(f"guard/{name}/high")
        if value is not None and ((low is not None and value < low) or (high is not None and value > high)):
            return row["seen"]
    return None


def _banded(row: Row) -> set[str]:
    ends = [key for key in row if key.startswith("guard/") and key.endswith(("/low", "/high"))]
    return {key.removeprefix("guard/").rpartition("/")[0] for key in ends}


def combine(runs: Mapping[str, list[list[Row]]]) -> dict[str, Any]:
    """What each arm gained in both rewards, and how its rewards pulled."""
    found = {}
    for arm, seeds in runs.items():
        scale = float(arm.rpartition(" ")[2])
        sizes, detectors, pulls, cosines = [], [], [], []
        for rows in seeds:
            evaluated = [row for row in rows if "eval/size/mean" in row]
            first, last = evaluated[0], evaluated[-1]
            flat = FLAT_KB * scale
            sizes.append((last["eval/size/mean"] + flat) / (first["eval/size/mean"] + flat) - 1)
            detectors.append(last["eval/shapes_alignment/mean"] / first["eval/shapes_alignment/mean"] - 1)
            pulls += [row["advantage/shapes_alignment/correlation"] for row in rows if _has_parts(row)]
            cosines += [row["gradient/size/shapes_alignment/cosine"] for row in rows if _has_cosine(row)]
        found[arm] = {
            "payload": mean_and_error(sizes),
            "detector": mean_and_error(detectors),
            "correlation_of_alignment": mean_and_error(pulls)["mean"],
            "cosine": mean_and_error(cosines)["mean"],
            "num_seeds": len(seeds),
        }
    return {"arms": found}


def _has_parts(row: Row) -> bool:
    return "advantage/shapes_alignment/correlation" in row


def _has_cosine(row: Row) -> bool:
    return "gradient/size/shapes_alignment/cosine" in row


Part = tuple[Callable[[Mapping[str, list[list[Row]]]], dict[str, Any]], list[Arm]]
PARTS: dict[str, Part] = {
    "collapse": (collapse, [_COLLAPSE, *_HEALTHY]),
    "raise_kl": (raise_kl, [held_arm(ITERATIONS)]),
    "combine": (combine, combined_arms()),
}


def rows_of(folder: Path) -> list[Row]:
    """Returns the lines of a run, each with `seen`: the queries before the weights that its evaluation describes."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seen = 0
    for row in rows:
        row["seen"] = seen
        seen = row.get("queries", seen)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS))
    add_seed_arguments(parser)
    parser.set_defaults(runs=Path("runs/learning/guards"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/guards"), help="folder of the JSON files")
    text = f"of raise_kl, by {MEASUREMENTS}; the learning rate times them is {LEARNING} (default {ITERATIONS})"
    parser.add_argument("--iterations", type=int, default=ITERATIONS, help=text)
    arguments = parser.parse_args()
    if arguments.iterations < 1 or arguments.iterations % MEASUREMENTS:
        parser.error(f"--iterations {arguments.iterations} is no multiple of {MEASUREMENTS}")
    summarise, arms = PARTS[arguments.part]
    if arguments.part == "raise_kl":
        arms = [held_arm(arguments.iterations)]

    # Train what is missing, seed by seed; runs find the reward above.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    wanted = {}
    for seed in arguments.seeds:
        for arm in arms:
            folder = run_folder(arguments.runs, arm, seed)
            wanted[folder] = arm.arguments(seed, folder)
    try:
        train_all(wanted, arguments.jobs)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130

    # Summarise them.
    runs = {arm.name: [rows_of(run_folder(arguments.runs, arm, seed)) for seed in arguments.seeds] for arm in arms}
    summary = summarise(runs)
    if arguments.part == "raise_kl":
        folders = [run_folder(arguments.runs, arms[0], seed) for seed in arguments.seeds]
        on_other_images(summary["seeds"], folders)
        for found, folder in zip(summary["seeds"], folders, strict=True):
            found["by_caption"] = by_caption(folder)
    name = arms[0].name if arguments.part == "raise_kl" else arguments.part
    print_summary({"part": arguments.part, **summary}, arguments.out / f"{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
