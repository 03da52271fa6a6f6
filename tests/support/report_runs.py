"""Run folders as a run leaves them, written in milliseconds: a reward that rises, a held-out one that falls."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from rlcm_fast.config import Config, EvaluationConfig, to_yaml
from rlcm_fast.run_folder.evaluation_files import write_evaluation

PROMPTS = ("a red circle", "a blue square", "a star")
NUM_IMAGES = 12


def make_run(
    run_dir: Path, num_iterations: int = 10, seed: int = 0, prompts: Sequence[str] = PROMPTS, is_ended: bool = True
) -> Path:
    """Writes a whole run folder, evaluated every 5 iterations; without `is_ended` it stopped half way."""
    run_dir.mkdir(parents=True)
    options = ["--num_iterations", str(num_iterations), "--seed", str(seed), "--run_dir", str(run_dir)]
    evaluation = EvaluationConfig(every=5, num_images=NUM_IMAGES)
    config = Config(num_iterations=num_iterations, seed=seed, run_dir=str(run_dir), evaluation=evaluation)
    (run_dir / "config.yaml").write_text(to_yaml(config))
    command = ["train.py", "--config", "shapes/compressibility_paper", *options]
    environment = {"python": "3.11", "packages": {"torch": "2.11"}, "command": command, "num_processes": 2}
    (run_dir / "environment.json").write_text(json.dumps(environment))

    # Numbers, and pictures of some iterations.
    numbers = random.Random(seed)
    done = num_iterations if is_ended else num_iterations // 2
    lines = [line(number, numbers) for number in range(done)]
    lines += [{"iteration": done, "queries": 8 * done, **evaluated(done)}] if is_ended else []
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    (run_dir / "grids").mkdir()
    (run_dir / "guard").mkdir()
    (run_dir / "guard" / "000005.png").write_bytes(png((200, 90, 90), (200, 60)))
    for number in range(0, done + 1, 5):
        (run_dir / "grids" / f"{number:06d}.png").write_bytes(png((25 * number % 255, 90, 90), (200, 60)))
        scores = [scored(index, number, prompts) for index in range(NUM_IMAGES)]
        files = {row["file"]: png((20 * index, 10 * number, 120), (64, 64)) for index, row in enumerate(scores)}
        write_evaluation(run_dir, number, scores, files)
    if is_ended:
        (run_dir / "export").mkdir()
    return run_dir


def line(number: int, numbers: random.Random) -> dict[str, float]:
    """Returns an iteration's metrics; the reward rises by 0.1 an iteration."""
    reward = -2.0 + 0.1 * number + numbers.uniform(-0.01, 0.01)
    rewards = {f"reward/{name}/{key}": v for name in ("total", "jpeg") for key, v in (("mean", reward), ("std", 0.1))}
    rest = {"approx_kl": 1e-4, "kl_to_start": 0.01 * number, "images_per_second": 4.0, "seconds/iteration": 2.0}
    return {
        "iteration": number,
        "queries": 8 * (number + 1),
        **rewards,
        **rest,
        **(evaluated(number) if number % 5 == 0 else {}),
    }


def evaluated(number: int) -> dict[str, float]:
    """Returns an evaluation's metrics: jpeg rises, shown falls; their standard errors are 0.1 / sqrt(NUM_IMAGES)."""
    means = {"jpeg": -2.0 + 0.1 * number, "shown": 0.9 - 0.05 * number}
    found = {f"eval/{name}/{key}": v for name, mean in means.items() for key, v in (("mean", mean), ("std", 0.1))}
    return {**found, "eval/diversity": 0.2}


def scored(index: int, number: int, prompts: Sequence[str]) -> dict[str, Any]:
    """Returns an image's scores: the rewards rank images in opposite orders."""
    scores = {"eval/jpeg": -2.0 + 0.1 * number + 0.01 * index, "eval/shown": 0.9 - 0.05 * number - 0.011 * index}
    return {"image": index, "prompt": prompts[index % len(prompts)], "scores": scores, "file": f"{index:04d}.png"}


def png(colour: tuple[int, int, int], size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()
