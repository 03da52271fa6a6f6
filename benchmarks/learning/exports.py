"""Models scored after training: more images than an evaluation during a run, and prompts or steps it did not have.

An answer is kept beside the model's run (RUN/scores/KEY.json), so that a command given again does not draw anew.
"""

from __future__ import annotations

import hashlib
import json
import signal
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, run_folder

GUIDANCE = 4.0
SEED = 7  # of noise and order of prompts; evaluations during training have another
BATCH_SIZE = 64


def score(
    model: str, kept: Path, source: str, rewards: Sequence[str], num_steps: int, num_images: int
) -> dict[str, float]:
    """Reward -> mean over images of the pipeline `model` (a folder or shipped model), and `seconds_per_image`.

    source: as prompts.source; rewards: names, or mappings as `rlcm-fast evaluate` takes them; kept: a folder.
    """
    asked = {"source": source, "rewards": list(rewards), "num_steps": num_steps, "num_images": num_images, "seed": SEED}
    key = hashlib.sha256(json.dumps({"model": model, **asked}).encode()).hexdigest()[:16]
    path = kept / f"{key}.json"
    if not path.exists():
        found = _measured(model, source, rewards, num_steps, num_images)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")  # Ctrl-C may come at any time
        unfinished.write_text(json.dumps({"asked": asked, "found": found}), encoding="utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text())["found"]


def scores_by_arm(
    arms: Sequence[Arm],
    arguments: Namespace,
    source: str,
    rewards: Sequence[str],
    num_steps: int,
    num_images: int,
    jobs: int = 1,
) -> dict[str, list[dict[str, float]]]:
    """arm -> a `score` for each seed's export; `jobs` at a time, so their seconds are for jobs=1 only."""
    folders = [run_folder(arguments.runs, arm, seed) for arm in arms for seed in arguments.seeds]
    measure = partial(_score_of_run, asked=(source, rewards, num_steps, num_images))
    if jobs == 1:
        found = [measure(folder) for folder in folders]
    else:
        dies_at_once = (signal.SIGINT, signal.SIG_DFL)  # and says nothing: Ctrl-C reaches all processes
        with ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, dies_at_once) as pool:
            found = list(pool.map(measure, folders))
    count = len(arguments.seeds)
    return {arm.name: found[place * count : (place + 1) * count] for place, arm in enumerate(arms)}


def _score_of_run(folder: Path, asked: tuple[str, Sequence[str], int, int]) -> dict[str, float]:
    return score(str(folder / "export"), folder / "scores", *asked)


def start_score(
    model: str, arguments: Namespace, source: str, rewards: Sequence[str], num_steps: int, num_images: int
) -> dict[str, float]:
    """Of the model that the runs started from, as `shapes/lcm`."""
    return score(model, arguments.runs / "scores", source, rewards, num_steps, num_images)


def save_pictures(models: Mapping[str, str], source: str, num_images: int, path: Path) -> None:
    """A row of images for each model, by label; a column for each prompt, with the same noise in all rows."""
    import torch

    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.grids import captioned_grid
    from rlcm_fast.prompts import deal, load_prompts

    torch.set_num_threads(1)
    texts = [prompt.text for prompt in deal(load_prompts(source, "prompts"), num_images, SEED)]
    images = [draw(load_pipeline(model), texts, 4, GUIDANCE, SEED, num_images)[0] for model in models.values()]
    path.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(torch.cat(images), [f"{label}: {text}" for label in models for text in texts], num_images).save(path)


def _measured(model: str, source: str, names: Sequence[str], num_steps: int, num_images: int) -> dict[str, Any]:
    import torch

    from rlcm_fast.cli.evaluate import measure, reward_configs
    from rlcm_fast.cli.pipelines import load_pipeline
    from rlcm_fast.prompts import deal, load_prompts
    from rlcm_fast.rewards import build_rewards

    torch.set_num_threads(1)  # as the runs had, beside which other work may go on
    rewards = {name: reward for name, (reward, _) in build_rewards(reward_configs(names)).items()}
    prompts = deal(load_prompts(source, "prompts"), num_images, SEED)
    settings = Namespace(guidance_scale=GUIDANCE, seed=SEED, batch_size=BATCH_SIZE)
    result = measure(load_pipeline(model), prompts, rewards, num_steps, settings)
    means = {name: numbers["mean"] for name, numbers in result["rewards"].items()}
    return {**means, "seconds_per_image": result["seconds_per_image"]}
