"""Whether raise_kl holds pictures: compressibility_paper.yaml under the guard alone, in steps of any size.

A run is measured 32 times. More iterations take smaller steps, so that the learning rate times them stays the same.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm
from benchmarks.shared.training_runs import Row

FLAT_KB = 0.69  # of a blank image of 64 x 64 at quality 95
DETECTOR, KB = "guard/shapes_alignment", "guard/jpeg_kb"
ITERATIONS, LEARNING = 960, 9.6e-3  # default of --iterations; learning rate times iterations
MEASUREMENTS = 32
_REWARDS = ("jpeg_compressibility", "shapes_alignment")
_OTHER_IMAGES = ("--prompts", "shapes:one:held_out", "--num-images", "2048", "--seed", "1000")


def held_arm(num_iterations: int) -> Arm:
    """Returns the arm that raise_kl holds: more iterations take smaller steps, and go as far all in all."""
    every = str(num_iterations // MEASUREMENTS)
    return Arm(
        f"raise_kl_{num_iterations}",
        "compressibility_paper",
        (
            *("guard.action", "raise_kl", "guard.z", "2", "evaluation.num_images", "3072", "evaluation.every", every),
            *("num_iterations", str(num_iterations), "optimizer.lr", f"{LEARNING / num_iterations:.3g}"),
            *("checkpoint.every", every, "checkpoint.keep", "40"),  # so that the lowest payload can be scored once more
        ),
    )


def raise_kl(runs: Mapping[str, list[list[Row]]]) -> dict[str, Any]:
    """The payload and the detector of each seed: at the end, and the lowest payload with the detector at 95 %."""
    return {"seeds": [_held(rows) for seeds in runs.values() for rows in seeds]}


def _held(rows: Sequence[Row]) -> dict[str, Any]:
    # Measure relative to the start.
    measured = [row for row in rows if DETECTOR in row]
    first = measured[0]
    points: list[dict[str, float]] = []
    for row in measured:
        point = {"iteration": row["iteration"], "queries": row["seen"], "payload": _payload(row, first)}
        point["detector"] = row[DETECTOR] / first[DETECTOR]
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
            flat = FLAT_KB / abs(start[_REWARDS[0]])
            found[name]["on_other_images"] = {"payload": (kilobytes - flat) / (1 - flat) - 1, "detector": detector}


def by_caption(run_dir: Path) -> dict[str, dict[str, float]]:
    """Returns of each held-out caption the change of its payload, and the detector's score before and after the run.

    Before and after are the first and the latest evaluation whose scores lie in the run's folder.
    """
    evaluations = sorted((run_dir / "evaluation").iterdir())
    (kb_before, before), (kb_after, after) = (_of_captions(folder) for folder in (evaluations[0], evaluations[-1]))
    return {
        caption: {
            "payload": (kb_after[caption] - FLAT_KB) / (kb_before[caption] - FLAT_KB) - 1,
            "detector_before": before[caption],
            "detector_after": after[caption],
        }
        for caption in sorted(before)
    }


def _of_captions(evaluation: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the mean size in kB, and the detector's mean score, of the images of each caption."""
    rows = [json.loads(line) for line in (evaluation / "scores.jsonl").read_text().splitlines()]

    def means(reward: str, sign: float) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for row in rows:
            values.setdefault(row["prompt"], []).append(sign * row["scores"][f"eval/{reward}"])
        return {caption: statistics.fmean(of_caption) for caption, of_caption in values.items()}

    return means(_REWARDS[0], -1.0), means(_REWARDS[1], 1.0)


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
    return (row[KB] - FLAT_KB) / (first[KB] - FLAT_KB) - 1
