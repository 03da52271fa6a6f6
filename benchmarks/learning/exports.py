"""Models scored after training: more images than an evaluation during a run, and prompts or steps it did not have.

An answer is kept beside the model's run (RUN/scores/KEY.json), so that a command given again does not draw anew.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import signal
from argparse import Namespace
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.learning.arms import Arm, run_folder

GUIDANCE = 4.0
SEED = 7  # of noise and order of prompts; evaluations during training have another
BATCH_SIZE = 64
START = "shapes/lcm"  # the model that most figures' runs start from

Score = dict[str, float]  # reward -> mean over images; and seconds_per_image


@dataclass(frozen=True)
class Exam:
    """What a model is scored on."""

    source: str  # as prompts.source
    rewards: Sequence[str]  # names, or mappings as `rlcm-fast evaluate` takes them
    num_steps: int
    num_images: int


def score(model: str, kept: Path, exam: Exam) -> Score:
    """Scores the pipeline `model`, a folder or shipped model; `kept` is the folder of the answers."""
    asked = {
        "source": exam.source,
        "rewards": list(exam.rewards),
        "num_steps": exam.num_steps,
        "num_images": exam.num_images,
        "seed": SEED,
    }
    key = hashlib.sha256(json.dumps({"model": model, **asked}).encode()).hexdigest()[:16]
    path = kept / f"{key}.json"
    if not path.exists():
        found = _measured(model, exam)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")  # Ctrl-C may come at any time
        unfinished.write_text(json.dumps({"asked": asked, "found": found}), encoding="utf-8")
        unfinished.replace(path)
    return json.loads(path.read_text())["found"]


def scores_by_arm(arms: Sequence[Arm], arguments: Namespace, exam: Exam, jobs: int = 1) -> dict[str, list[Score]]:
    """arm -> a `score` for each seed's export; `jobs` at a time, so their seconds are for jobs=1 only."""
    # Score all runs, in processes of their own where that is asked for.
    folders = []
    for arm in arms:
        folders += [run_folder(arguments.runs, arm, seed) for seed in arguments.seeds]
    measure = partial(_score_of_run, exam=exam)
    if jobs == 1:
        found = [measure(folder) for folder in folders]
    else:
        dies_at_once = (signal.SIGINT, signal.SIG_DFL)  # and says nothing: Ctrl-C reaches all processes
        with ProcessPoolExecutor(jobs, get_context("spawn"), signal.signal, dies_at_once) as pool:
            found = list(pool.map(measure, folders))

    # Hand each arm those of its seeds.
    scores = iter(found)
    return {arm.name: list(itertools.islice(scores, len(arguments.seeds))) for arm in arms}


def _score_of_run(folder: Path, exam: Exam) -> Score:
    return score(str(folder / "export"), folder / "scores", exam)


def start_score(model: str, arguments: Namespace, exam: Exam) -> Score:
    """Scores the model that the runs started from."""
    return score(model, arguments.runs / "scores", exam)


def scores_with_start(arms: Sequence[Arm], arguments: Namespace, exam: Exam, jobs: int = 1) -> dict[str, list[Score]]:
    """`scores_by_arm`, and first "start" with the one score of the start model."""
    start = start_score(START, arguments, exam)
    return {"start": [start], **scores_by_arm(arms, arguments, exam, jobs)}


def picture_arms(arms: Sequence[Arm], arguments: Namespace, source: str, num_images: int) -> None:
    """OUT_pictures.png: what the start model paints, and each arm's first seed after training."""
    models = {"start": START}
    for arm in arms:
        models[arm.name] = str(run_folder(arguments.runs, arm, arguments.seeds[0]) / "export")
    save_pictures(models, source, num_images, arguments.out.with_name(f"{arguments.out.name}_pictures.png"))


def save_pictures(models: Mapping[str, str], source: str, num_images: int, path: Path) -> None:
    """A row of images for each model, by label; a column for each prompt, with the same noise in all rows."""
    import torch

    from rlcm_fast.cli.pipelines import draw, load_pipeline
    from rlcm_fast.grids import captioned_grid
    from rlcm_fast.prompts import load_prompts, prompts_for_images

    torch.set_num_threads(1)
    texts = [prompt.text for prompt in prompts_for_images(load_prompts(source, "prompts"), num_images, SEED)]
    rows, captions = [], []
    for label, model in models.items():
        images, _ = draw(load_pipeline(model), texts, 4, GUIDANCE, SEED, num_images)
        rows.append(images)
        captions += [f"{label}: {text}" for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    captioned_grid(torch.cat(rows), captions, num_images).save(path)


def _measured(model: str, exam: Exam) -> dict[str, Any]:
    import torch

    from rlcm_fast.cli.evaluate import measure, reward_configs
    from rlcm_fast.cli.pipelines import load_pipeline
    from rlcm_fast.prompts import load_prompts, prompts_for_images
    from rlcm_fast.rewards import build_rewards

    torch.set_num_threads(1)  # as the runs had, beside which other work may go on
    rewards = {name: reward for name, (reward, _) in build_rewards(reward_configs(exam.rewards)).items()}
    prompts = prompts_for_images(load_prompts(exam.source, "prompts"), exam.num_images, SEED)
    settings = Namespace(guidance_scale=GUIDANCE, seed=SEED, batch_size=BATCH_SIZE)
    result = measure(load_pipeline(model), prompts, rewards, exam.num_steps, settings)
    means = {name: numbers["mean"] for name, numbers in result["rewards"].items()}
    return {**means, "seconds_per_image": result["seconds_per_image"]}
