"""The rewards of a config: their models' files, what they answer to one picture, and their test of themselves."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlcm_fast.cli.diagnoses import Diagnosis, State
from rlcm_fast.cli.scoring import raw_scores
from rlcm_fast.config import RewardConfig
from rlcm_fast.config.resolved import ResolvedRun
from rlcm_fast.faults import Fault
from rlcm_fast.plugins import load_class
from rlcm_fast.prompts import PREFIX, load_prompts
from rlcm_fast.rewards import BUILT_IN, GroupReward, PersonReward, check_name, grouped, inner, make_placed, place
from rlcm_fast.rewards.models import ModelFiles, files_of
from rlcm_fast.rewards.self_tests import TestsItself
from rlcm_fast.trajectory import Prompt

_PIXELS = 512  # per side, where the config leaves the size to the model


@dataclass(frozen=True)
class Asked:
    """A reward of the config, and a prompt that it will see."""

    field: str
    config: RewardConfig
    prompt: Prompt


def asked_of(run: ResolvedRun) -> list[Asked]:
    """The rewards of all tasks and of the evaluation, those with equal arguments once."""
    found: dict[str, Asked] = {}
    for task in run.tasks:
        for index, reward in enumerate(task.rewards):
            asked = Asked(f"{task.rewards_field}[{index}]", reward, _first_prompt(task.source, task.source_field))
            found.setdefault(_key(reward), asked)
    first = run.tasks[0]
    for index, reward in enumerate(run.config.evaluation.rewards):
        asked = Asked(f"evaluation.rewards[{index}]", reward, _first_prompt(first.source, first.source_field))
        found.setdefault(_key(reward), asked)
    return list(found.values())


def _key(reward: RewardConfig) -> str:
    """The same for rewards that are built once."""
    return repr((reward.name, reward.arguments, reward.device, reward.dtype, reward.batch_size))


def _first_prompt(source: str, field: str) -> Prompt:
    """The first prompt of a source; a made-up one for a dataset that may be on a network."""
    return Prompt("a photo of a cat") if source.startswith(PREFIX) else load_prompts(source, field)[0]


def examine(
    asked: Asked, image_size: tuple[int, int] | None, asks_endpoints: bool, scores: bool
) -> Iterator[Diagnosis]:
    """Yields the rows of one reward: files first; if they are here, what it answers to one picture.

    A reward with a URL is asked only if `asks_endpoints`, and none is built unless `scores`.
    """
    # Look for the files.
    what, config = f"reward {asked.config.name}", asked.config
    try:
        check_name(config.name, f"{asked.field}.name")
        there = place(config, asked.field)
        files = files_of(load_class(there.name, BUILT_IN, asked.field), there.arguments)
        rows = [_of_files(what, of_model) for of_model in files]
    except ValueError as error:
        yield Diagnosis(what, State.WRONG, str(error))
        return
    yield from rows

    # Let it score.
    is_remote = any(isinstance(value, str) and "://" in value for value in there.arguments.values())
    if any(row.state is not State.OK for row in rows):
        return
    if not scores or (is_remote and not asks_endpoints):
        yield Diagnosis(what, State.NOTE, "was not asked to score a picture")
        return
    yield from _answers(what, asked, image_size or (_PIXELS, _PIXELS))
    if files:
        gc.collect()  # the model goes before the next one loads


def _of_files(what: str, files: ModelFiles) -> Diagnosis:
    """The row of one model of a reward."""
    try:
        place = files.find()
    except ValueError as error:
        return Diagnosis(what, State.WRONG, str(error))
    weights = files.weights
    if place is not None:
        return Diagnosis(what, State.OK, f"{files.field}: {files.source}, licence {weights.licence}, at {place}")
    words = f"{files.field}: {files.source}, {weights.gigabytes:.2g} GB to download, licence {weights.licence}"
    return Diagnosis(what, State.DOWNLOAD, words, {"download_gb": weights.gigabytes})


def _answers(what: str, asked: Asked, size: tuple[int, int]) -> Iterator[Diagnosis]:
    """Yields what the reward answers to one picture, and its test of itself; a person is asked nothing."""
    # Build it and show it the picture.
    config, prompt = asked.config, asked.prompt
    try:
        reward = grouped(config.name, make_placed(config, asked.field), config.group_size, config.credit)
        readiness = reward.asking.readiness() if isinstance(reward, PersonReward) else ""
    except ValueError as error:
        yield Diagnosis(what, State.WRONG, str(error))
        return
    if readiness:
        yield Diagnosis(what, State.OK, f"{readiness}; nobody was asked")
        return
    start = time.perf_counter()
    try:
        raw = raw_scores(config.name, reward, test_picture(size), [prompt])[0]
    except Fault as error:
        yield Diagnosis(what, State.WRONG, str(error))
        return
    seconds = time.perf_counter() - start
    answer = f"{len(raw)} numbers" if isinstance(reward, GroupReward) else f"{raw.item():.4g}"
    words = f"answers {answer} to one picture in {seconds:.2g} s, prompt {prompt.text[:60]!r}"
    yield Diagnosis(what, State.OK, words, {"seconds": seconds, "answer": raw.tolist()})

    # Compare with what is known.
    plain = inner(reward.reward if isinstance(reward, GroupReward) else reward)
    test = plain.self_test() if isinstance(plain, TestsItself) else None
    if test is not None:
        state = State.OK if test.has_passed else State.WRONG
        words = f"self-test: {test.what} gives {test.found:.5g}, expected {test.expected:.5g} +- {test.tolerance:.1g}"
        yield Diagnosis(what, state, words, {"found": test.found, "expected": test.expected})


def test_picture(size: tuple[int, int]) -> Tensor:
    """A picture (1, 3, H, W) float32 in [0, 1]: an orange disc before a blue sky."""
    height, width = size
    short = min(size)
    down, across = (torch.linspace(-side / short, side / short, side) for side in size)
    distance = (down[:, None].square() + across.square()).sqrt()  # from the centre
    disc = ((0.5 - distance) * short / 4).clamp(0, 1)
    row = torch.linspace(-1, 1, height)
    sky = torch.stack([0.3 + 0.1 * row, 0.5 + 0.1 * row, 0.8 + 0.1 * row])[:, :, None].expand(3, height, width)
    orange = torch.tensor([0.9, 0.5, 0.1])[:, None, None]
    return (disc * orange + (1 - disc) * sky)[None]
