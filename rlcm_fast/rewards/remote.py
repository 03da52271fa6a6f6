"""Scores images on another GPU or machine: by a reward that `rlcm-fast reward-server` serves.

    score = the served reward's score of the image in 8 bits       protocol.py has the protocol

The server's reward sees what a PNG holds, images rounded to 1/255. For these the scores are bitwise those of the same
reward in this process, as far as the reward itself gives an image the same bits in every batch. Requests go out
`calls.at_once` at a time from each process of the run, and the server puts those that come together into one batch.

A request that fails is repeated `calls.attempts` times in all; an image that the server cannot score has no score, and
only that image. Licence and memory: those of the served reward; nothing of it is loaded here. Test value: a served
jpeg_compressibility scores an image that was rounded before as it does here.
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from PIL import Image
from torch import Tensor

from rlcm_fast.rewards.encoding import png, to_pictures
from rlcm_fast.rewards.endpoint import BadAnswer, CallFailed, Calls, Endpoint, check_whole
from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.models import ModelFiles, OnModels
from rlcm_fast.rewards.outcomes import Failed, Outcome, scores_of
from rlcm_fast.rewards.protocol import VERSION, read_answer, request_of
from rlcm_fast.trajectory import Prompt


class RemoteReward(OnModels):
    """The scores of a reward that is served elsewhere."""

    scope = "image"
    asks_server = True
    FACTS = Facts(
        formula="the score of the served reward, of the image in 8 bits",
        likes="what the served reward likes",
        weights=(),
    )

    def __init__(
        self, url: str, reward: str = "", images_per_call: int = 8, calls: Mapping[str, Any] | None = None
    ) -> None:
        """Ask the server at `url` (http://HOST:PORT) what it serves; raises ValueError if it is not there.

        reward: the name that the server must serve; empty takes any. images_per_call: images of one request. calls:
        timeout_s, attempts, at_once, api_key_variable.
        """
        check_whole("images_per_call", images_per_call)
        self._images_per_call = images_per_call
        self._endpoint = Endpoint(url, Calls.of(calls))
        self._health = _health(self._endpoint, url, reward)
        self._name = str(self._health["reward"])

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """No files; raises ValueError for settings that are wrong whatever the server says."""
        check_whole("images_per_call", arguments["images_per_call"])
        Calls.of(arguments["calls"])
        return []

    @property
    def used(self) -> dict[str, Any]:
        """The server, what it serves and on which models, as JSON."""
        return {"url": self._endpoint.url, **self._health}

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 of images (B, 3, H, W) float32 in [0, 1]."""
        pictures = to_pictures(images)
        parts = range(0, len(pictures), self._images_per_call)
        calls = [partial(self._ask, pictures, prompts, slice(part, part + self._images_per_call)) for part in parts]
        outcomes: list[Outcome] = []
        for answer in self._endpoint.each(calls):
            size = len(pictures[len(outcomes) : len(outcomes) + self._images_per_call])
            outcomes += [answer] * size if isinstance(answer, Failed) else answer
        return scores_of(outcomes)

    def _ask(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt], part: slice) -> list[Outcome]:
        """The outcomes of a part of the images, by one request."""
        size = len(pictures[part])
        return self._endpoint.ask(
            "/score", lambda: self._body(pictures[part], prompts[part]), lambda answer: read_answer(answer, size)
        )

    def _body(self, pictures: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, Any]:
        pngs = [png(picture) for picture in pictures]
        size, most = sum(map(len, pngs)), self._health["most_bytes"]
        if size > most:
            raise CallFailed(
                f"{len(pngs)} images are {size} bytes, and the server takes {most}; lower images_per_call, or raise "
                "the server's --most-mib"
            )
        return request_of(self._name, prompts, pngs)


def _health(endpoint: Endpoint, url: str, reward: str) -> dict[str, Any]:
    """What the server says of itself; raises ValueError unless it serves `reward` in this protocol."""
    try:
        health = endpoint.get("/health")
        protocol, name, most_bytes = health["protocol"], health["reward"], health["most_bytes"]
    except CallFailed as error:
        raise ValueError(f"url={url} {error}; start rlcm-fast reward-server there, or correct url") from error
    except (BadAnswer, KeyError, TypeError) as error:
        raise ValueError(f"url={url} is no rlcm-fast reward-server; give its address without a path") from error
    if protocol != VERSION or not isinstance(most_bytes, int):
        raise ValueError(f"url={url} speaks protocol {protocol}, and this version {VERSION}; install one version")
    if reward not in ("", name):
        raise ValueError(f"reward={reward} is not served at {url}, but {name}; correct reward or url")
    return dict(health)
