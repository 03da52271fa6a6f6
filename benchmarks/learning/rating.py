"""Does a model learn the taste of whoever rates it? A scripted rater (scripted_rater.py) rates 60 rounds of 16 images.

    python benchmarks/learning/rating.py --seeds 0 1 2                # rates by hand, through the page
    python benchmarks/learning/rating.py --from-ratings --seeds 0 1 2 # trains on the ratings.jsonl of those runs

The figure is the win rate of the tuned model against the start: images of the same prompts and seeds, compared by the
rater without its errors; a tie is half a win. Runs lie in RUNS/NAME/seed_N; a run that was stopped goes on, and
`--minutes` stops it by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import ROOT, command, machine, mean_and_error, print_summary

CONFIG = "shapes/rating"
GUIDANCE = 1.0
_AT_ONCE = '--rewards=[{"name": "human", "arguments": {"undo_seconds": 0}}]'  # a program takes nothing back
_QUIET = ("--tracking.grid_every", "0", "--tracking.tensorboard", "false")
_FAREWELL = 60.0  # seconds in which a run that is stopped saves
_STARTS_WITHIN = 600.0  # seconds until the page is there, also on a machine that does something else


def main() -> int:
    arguments = _parser().parse_args()
    until = time.monotonic() + 60 * arguments.minutes
    found = {}
    for seed in arguments.seeds:
        folder = arguments.runs / arguments.name / f"seed_{seed}"
        if not (folder / "export").is_dir():
            train = _train_on_file if arguments.from_ratings else _train_by_hand
            if not train(arguments, folder, seed, until):
                print(f"{folder} goes on with the same command", flush=True)
                return 0
        found[seed] = _measured(folder, arguments)
        print(f"seed {seed}: {found[seed]}", flush=True)
    rates = [measured["win_rate"] for measured in found.values()]
    print_summary(
        {
            "command": command(),
            "machine": machine(),
            "rater_errors": arguments.errors,
            "win_rate": mean_and_error(rates),
            "by_seed": {str(seed): measured for seed, measured in found.items()},
        },
        arguments.out,
    )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="rating", help="of the folder of the runs, and of the result")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--errors", type=float, default=0.1, help="how often the rater's hand slips (default 0.1)")
    parser.add_argument("--images", type=int, default=256, help="pairs that are compared at the end (default 256)")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"), metavar="DIR")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop, and save, after so many")
    parser.add_argument("--from-ratings", action="store_true", help="train the reward `ratings` on recorded ratings")
    parser.add_argument("--recorded", default="rating", help="--from-ratings: name of the runs with the ratings")
    parser.add_argument("--override", nargs="*", default=[], metavar="FIELD=VALUE", help="of the config")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser


def _train_by_hand(arguments: argparse.Namespace, folder: Path, seed: int, until: float) -> bool:
    """Starts `rlcm-fast rate`, rates until the run ends, and tells whether it came to its end."""
    from benchmarks.learning.scripted_rater import ScriptedRater
    from rlcm_fast.rating.reward import wait_for_page

    folder.mkdir(parents=True, exist_ok=True)
    options = ["--config", CONFIG, "--port", "0", _AT_ONCE, *_options(arguments, folder, seed)]
    with (folder / "log.txt").open("a") as log:
        process = _start(["rate", *options], log)
        try:
            url = wait_for_page(folder, _STARTS_WITHIN)
            while url and process.poll() is None and time.monotonic() < until:
                ScriptedRater(url, arguments.errors, 1000 * seed + _num_answers(folder)).rate(until)
        finally:
            _stop(process)
    return (folder / "export").is_dir()


def _num_answers(folder: Path) -> int:
    file = folder / "ratings.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def _train_on_file(arguments: argparse.Namespace, folder: Path, seed: int, until: float) -> bool:
    """Trains on the reward `ratings`, made from the file of the run with the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    file = arguments.runs / arguments.recorded / f"seed_{seed}" / "ratings.jsonl"
    reward = f'--rewards=[{{"name": "ratings", "arguments": {{"file": "{file}", "embedding": "shapes"}}}}]'
    options = [f"--config={CONFIG}", reward, "--update.rollout_lag=0", *_options(arguments, folder, seed)]
    if any(folder.glob("checkpoints/*")):
        options += ["--resume", "latest"]
    with (folder / "log.txt").open("a") as log:
        process = _start(options, log)
        while process.poll() is None and time.monotonic() < until:
            time.sleep(0.5)
        _stop(process)
    return (folder / "export").is_dir()


def _options(arguments: argparse.Namespace, folder: Path, seed: int) -> list[str]:
    overrides = [f"--{override}" for override in arguments.override]
    return ["--run_dir", str(folder), "--seed", str(seed), *_QUIET, *overrides]


def _start(options: Sequence[str], log: Any) -> subprocess.Popen[bytes]:
    module = ["-m", "rlcm_fast.cli.main"] if options[0] == "rate" else [str(ROOT / "rlcm_fast" / "train.py")]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, *module, *options], stdout=log, stderr=log, env={**os.environ, "PYTHONPATH": path}
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(_FAREWELL)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _measured(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `_compared` does, once for a run."""
    file = folder / f"compared_{arguments.images}.json"
    if not file.exists():
        file.write_text(json.dumps(_compared(folder, arguments.images)))
    return json.loads(file.read_text())


def _compared(folder: Path, num_images: int) -> dict[str, Any]:
    """Compares images of the start and of the tuned model."""
    from benchmarks.learning.scripted_rater import red_circles
    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.prompts import load_prompts, prompts_for_images

    # Draw both with the same noise.
    prompts = prompts_for_images(
        load_prompts(str(ROOT / "configs" / "shapes" / "open_prompts.txt"), "prompts"), num_images, 7
    )
    texts = [prompt.text for prompt in prompts]
    grades = {}
    for name, path in (("start", "shapes/lcm"), ("tuned", str(folder / "export"))):
        drawn, _ = draw(load_pipeline(path), texts, 4, GUIDANCE, 7, 64)
        grades[name] = red_circles(drawn)

    return counted(grades["tuned"], grades["start"])


def counted(tuned_grades: Sequence[int], start_grades: Sequence[int]) -> dict[str, Any]:
    """Returns how often the tuned model's image has the better grade, a tie counting half, and each model's grades."""
    pairs = list(zip(tuned_grades, start_grades, strict=True))
    wins, losses = sum(tuned > start for tuned, start in pairs), sum(tuned < start for tuned, start in pairs)
    rate = (wins + (len(pairs) - wins - losses) / 2) / len(pairs)
    grades = {"start": start_grades, "tuned": tuned_grades}
    red = {name: [round(of.count(grade) / len(of), 4) for grade in (0, 1, 2)] for name, of in grades.items()}
    return {
        "win_rate": round(rate, 4),
        "wins": wins,
        "losses": losses,
        "ties": len(pairs) - wins - losses,
        "shares_of_grades_0_1_2": red,
    }


if __name__ == "__main__":
    sys.exit(main())
