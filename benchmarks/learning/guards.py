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
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.learning.arms import Arm, run_folder
from benchmarks.shared.reporting import ROOT, mean_and_error, print_summary
from benchmarks.shared.training_runs import Row, add_seed_arguments, train_all

_FLAT_KB = 0.69  # of a blank image of 64 x 64 at quality 95
_DETECTOR, _KB = "guard/shapes_alignment", "guard/jpeg_kb"
_REWARDS = ("jpeg_compressibility", "shapes_alignment")
_OTHER_IMAGES = ("--prompts", "shapes:one:held_out", "--num-images", "2048", "--seed", "1000")
_OFTEN = ("guard.every", "2", "evaluation.num_images", "128", "evaluation.every", "12", "checkpoint.every", "8")
_COLLAPSE = Arm("collapse", "compressibility_paper", ("guard.action", "warn", *_OFTEN, "num_iterations", "40"))
_HEALTHY = (
    Arm("compressibility", "compressibility", ("guard.action", "warn", *_OFTEN, "num_iterations", "48")),
    Arm("alignment", "alignment", ("guard.action", "warn", *_OFTEN, "guard.every", "6", "num_iterations", "36")),
)
_ITERATIONS, _LEARNING = 768, 9.6e-3  # default of --iterations; learning rate times iterations
_MEASUREMENTS = 32  # of a run that is held
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
    blank = [first_below(rows, _DETECTOR, 0.05) for rows in runs[_COLLAPSE.name]]
    return {"first_outside": spoken, "start_of_collapse": starts, "blank": blank}


def start_of_collapse(rows: Sequence[Row]) -> int | None:
    """Returns the queries at which the detector last was at 95 % of its start or above."""
    first = rows[0][_DETECTOR]
    good = [row["seen"] for row in rows if row.get(_DETECTOR, 0.0) >= 0.95 * first]
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


def held_arm(num_iterations: int) -> Arm:
    """Returns the arm that raise_kl holds: more iterations take smaller steps, and go as far all in all."""
    every = str(num_iterations // _MEASUREMENTS)
    return Arm(
        f"raise_kl_{num_iterations}",
        "compressibility_paper",
        (
            *("guard.action", "raise_kl", "guard.z", "2", "evaluation.num_images", "1024", "evaluation.every", every),
            *("num_iterations", str(num_iterations), "optimizer.lr", f"{_LEARNING / num_iterations:.3g}"),
            *("checkpoint.every", every, "checkpoint.keep", "40"),  # so that the lowest payload can be scored once more
        ),
    )


def raise_kl(runs: Mapping[str, list[list[Row]]]) -> dict[str, Any]:
    """The payload and the detector of each seed: at the end, and the lowest payload with the detector at 95 %."""
    return {"seeds": [_held(rows) for seeds in runs.values() for rows in seeds]}


def _held(rows: Sequence[Row]) -> dict[str, Any]:
    # Measure relative to the start.
    measured = [row for row in rows if _DETECTOR in row]
    first = measured[0]
    points: list[dict[str, float]] = []
    for row in measured:
        point = {"iteration": row["iteration"], "queries": row["seen"], "payload": _payload(row, first)}
        point["detector"] = row[_DETECTOR] / first[_DETECTOR]
        names = {"kl_weight": "guard/kl_weight", "divergence": "guard/kl_to_start"}
        points.append({**point, **{name: row[key] for name, key in names.items() if key in row}})

    # A lowest value is the luckiest one, too; a mean over the run's last quarter is not chosen.
    good = [point for point in points if point["detector"] >= 0.95]
    best = min(good, key=lambda point: point["payload"])
    late = points[-(len(points) // 4) :]
    means = {key: statistics.fmean(point[key] for point in late) for key in ("payload", "detector")}
    return {"lowest_payload_with_detector_at_95": best, "last": points[-1], "last_quarter": means, "curve": points}


def on_other_images(seeds: Sequence[dict[str, Any]], folders: Sequence[Path]) -> None:
    """Adds to each seed what its weights of the lowest payload, and its last ones, score on prompts drawn anew."""
    start = _scores("shapes/lcm", folders[0].with_name("start.json"))
    for found, folder in zip(seeds, folders, strict=True):
        iteration = found["lowest_payload_with_detector_at_95"]["iteration"]
        model = folder / "lowest"
        if iteration and not (model / "model_index.json").exists():
            _tool("export", str(folder), "--iteration", str(iteration), "--out", str(model), "--dtype", "fp32")
        models = {"lowest_payload_with_detector_at_95": model if iteration else "shapes/lcm", "last": folder / "export"}
        for name, weights in models.items():
            scores = _scores(str(weights), folder / f"{name}.json")
            kilobytes, detector = (scores[reward] / start[reward] for reward in _REWARDS)
            flat = _FLAT_KB / abs(start[_REWARDS[0]])
            found[name]["on_other_images"] = {"payload": (kilobytes - flat) / (1 - flat) - 1, "detector": detector}


def _scores(model: str, out: Path) -> dict[str, float]:
    """Returns the mean rewards of a model on images that no run is evaluated on."""
    if not out.exists():
        _tool("evaluate", "--model", model, "--rewards", *_REWARDS, *_OTHER_IMAGES, "--out", str(out))
    rewards = json.loads(out.read_text())["results"][0]["rewards"]
    return {name: reward["mean"] for name, reward in rewards.items()}


def _tool(*arguments: str) -> None:
    program = "from rlcm_fast.cli.main import main; raise SystemExit(main())"
    subprocess.run([sys.executable, "-c", program, *arguments], check=True)


def _payload(row: Row, first: Row) -> float:
    """Returns the change of the payload since the start."""
    return (row[_KB] - _FLAT_KB) / (first[_KB] - _FLAT_KB) - 1


def combine(runs: Mapping[str, list[list[Row]]]) -> dict[str, Any]:
    """What each arm gained in both rewards, and how its rewards pulled."""
    found = {}
    for arm, seeds in runs.items():
        scale = float(arm.rpartition(" ")[2])
        sizes, detectors, pulls, cosines = [], [], [], []
        for rows in seeds:
            evaluated = [row for row in rows if "eval/size/mean" in row]
            first, last = evaluated[0], evaluated[-1]
            flat = _FLAT_KB * scale
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
    "raise_kl": (raise_kl, [held_arm(_ITERATIONS)]),
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
    text = f"of raise_kl, by {_MEASUREMENTS}; the learning rate times them is {_LEARNING} (default {_ITERATIONS})"
    parser.add_argument("--iterations", type=int, default=_ITERATIONS, help=text)
    arguments = parser.parse_args()
    if arguments.iterations < 1 or arguments.iterations % _MEASUREMENTS:
        parser.error(f"--iterations {arguments.iterations} is no multiple of {_MEASUREMENTS}")
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
        on_other_images(summary["seeds"], [run_folder(arguments.runs, arms[0], seed) for seed in arguments.seeds])
    name = arms[0].name if arguments.part == "raise_kl" else arguments.part
    print_summary({"part": arguments.part, **summary}, arguments.out / f"{name}.json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
