"""The protocol between the reward `http` and `rlcm-fast reward-server`: JSON, PNG in base64, and never pickle.

    GET /health     {"protocol": 1, "reward": name, "device", "batch_size", "most_bytes", "used"}
    GET /metrics    counters, in the text format of Prometheus
    POST /score     {"protocol": 1, "reward": name, "prompts": [text], "tasks": [name], "metadata": [text],
                     "images": [base64 of a PNG]}
             200    {"protocol": 1, "reward": name, "scores": [number or null], "problems": [null or text]}

All lists have one entry per image, in one order. An entry of `metadata` is a JSON object as text, or empty; the list
may be left out. An image has a score or a problem, never both, so one that cannot be scored costs its neighbours
nothing. Other statuses carry {"error": text}:

    400     the request is no such JSON, or an image is no PNG of RGB
    401     the key is missing or wrong
    409     another reward is served here, or another version of the protocol
    413     the body is larger than `most_bytes`
    503     so many images wait that no more are taken; come back after Retry-After

A PNG holds 8 bits, so the server scores the rounded images; a JSON number holds every float32 exactly.
"""

# B images

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlcm_fast.rewards.encoding import pixels_of_png
from rlcm_fast.rewards.endpoint import BadAnswer
from rlcm_fast.rewards.outcomes import Failed, Outcome
from rlcm_fast.trajectory import Prompt

VERSION = 1


class Refused(Exception):
    """A request that is not served, and the status that says so."""

    def __init__(self, status: int, problem: str) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True)
class ScoreRequest:
    """A request that has been read."""

    pixels: list[np.ndarray]  # each (H, W, 3) uint8
    prompts: list[Prompt]


def request_of(reward: str, prompts: Sequence[Prompt], pngs: Sequence[str]) -> dict[str, Any]:
    """The body of a request; `pngs` are in base64."""
    return {
        "protocol": VERSION,
        "reward": reward,
        "prompts": [prompt.text for prompt in prompts],
        "tasks": [prompt.task for prompt in prompts],
        "metadata": [prompt.metadata for prompt in prompts],
        "images": list(pngs),
    }


def read_request(data: bytes, reward: str) -> ScoreRequest:
    """Reads the body of a request for `reward`; raises Refused."""
    # Read the JSON.
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON: {error}") from error
    if not isinstance(body, Mapping):
        raise Refused(400, "the body is no JSON object")
    if body.get("protocol") != VERSION or body.get("reward") != reward:
        wanted = f"{body.get('reward')} in protocol {body.get('protocol')}"
        raise Refused(409, f"{wanted} is not served here, but {reward} in protocol {VERSION}")

    # Read the images and their prompts.
    texts, tasks, images = (_texts(body, name) for name in ("prompts", "tasks", "images"))
    metadata = _texts(body, "metadata") if "metadata" in body else [""] * len(images)
    if not len(texts) == len(tasks) == len(images):
        raise Refused(400, f"{len(texts)} prompts, {len(tasks)} tasks and {len(images)} images; one of each is needed")
    if len(metadata) != len(images) or not all(_is_metadata(text) for text in metadata):
        raise Refused(400, f"metadata is no list of {len(images)} JSON objects as texts, or empty texts")
    try:
        pixels = [pixels_of_png(image) for image in images]
    except ValueError as error:
        raise Refused(400, str(error)) from error
    return ScoreRequest(pixels, [Prompt(*parts) for parts in zip(texts, tasks, metadata, strict=True)])


def _texts(body: Mapping[str, Any], name: str) -> list[str]:
    """A list of texts with at least one; raises Refused."""
    values = body.get(name)
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise Refused(400, f"{name} is no list of texts with at least one")
    return values


def _is_metadata(text: str) -> bool:
    """Tells whether the text is empty or a JSON object."""
    try:
        return not text or isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def answer_of(reward: str, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The body of an answer."""
    return {
        "protocol": VERSION,
        "reward": reward,
        "scores": [None if isinstance(outcome, Failed) else outcome for outcome in outcomes],
        "problems": [outcome.problem if isinstance(outcome, Failed) else None for outcome in outcomes],
    }


def read_answer(answer: Any, num_images: int) -> list[Outcome]:
    """The outcome of each image; raises BadAnswer."""
    try:
        pairs = list(zip(answer["scores"], answer["problems"], strict=True))
    except (KeyError, TypeError, ValueError) as error:
        raise BadAnswer("answered JSON without scores and problems of one length") from error
    if len(pairs) != num_images:
        raise BadAnswer(f"answered {len(pairs)} scores for {num_images} images")
    return [_outcome(score, problem) for score, problem in pairs]


def _outcome(score: Any, problem: Any) -> Outcome:
    if score is None and isinstance(problem, str):
        return Failed(problem)
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score) or problem is not None:
        raise BadAnswer(f"answered the score {score!r} with the problem {problem!r}; one of them is needed")
    return float(score)
