"""A rater that is a program: it prefers red circles, errs one time in ten, and rates through the page's own addresses.

It sees what a person sees: the images that the page shows, in the page's order, and nothing else. It picks the best
image, the best of the rest and so on; at each pick, with the given probability, its hand slips to any image that is
left. Images that it likes equally tie, and what it likes least stays unranked.
"""

from __future__ import annotations

import io
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from rlcm_fast.shapes.detector import MIN_CONFIDENCE, detect


def red_circles(images: torch.Tensor) -> list[int]:
    """Returns how much the rater likes images (B, 3, H, W): 2 for a red circle, 1 for red or a circle, 0 otherwise."""
    grades = []
    for detections in detect(images):
        seen = [found for found in detections if found.confidence >= MIN_CONFIDENCE]
        grades.append(max(((one.colour == "red") + (one.shape == "circle") for one in seen), default=0))
    return grades


def tiers_of(grades: Sequence[int], errors: float, generator: random.Random) -> list[list[int]]:
    """Returns the places of the images, best first; the grades that are least stay out, unless all are equal."""
    left = list(range(len(grades)))
    least = min(grades)
    tiers: list[list[int]] = []
    last: int | None = None  # the grade of the tier that is being filled
    while left and any(grades[place] > least for place in left):
        best = max(grades[place] for place in left)
        slips = generator.random() < errors
        place = generator.choice(left if slips else [place for place in left if grades[place] == best])
        ties = not slips and last == best
        if ties:
            tiers[-1].append(place)
        else:
            tiers.append([place])
        last = None if slips else best
        left.remove(place)
    return tiers or [list(range(len(grades)))]


class ScriptedRater:
    """Answers what a page asks until the run ends."""

    def __init__(self, url: str, errors: float, seed: int) -> None:
        """url: of the page, with its token."""
        self._url, self._errors = url, errors
        self._generator = random.Random(seed)
        self.answered = 0

    def rate(self, until: float) -> str:
        """Rates until the run ends or time.monotonic() is `until`; returns why it stopped."""
        version = ""
        while time.monotonic() < until:
            try:
                state = json.loads(self._get(f"state?after={version}"))
                version = str(state["version"])
                if state["end"]:
                    return state["end"]
                if state["question"]:
                    self._answer(state["question"])
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                return "gone"
        return "time"

    def _answer(self, question: dict[str, Any]) -> None:
        grades = red_circles(torch.stack([self._image(file) for file in question["images"]]))
        tiers = tiers_of(grades, self._errors, self._generator)
        try:
            self._post("answer", {"id": question["id"], "tiers": tiers})
            self.answered += 1
        except urllib.error.HTTPError as error:
            if error.code != 409:  # the run replaced the comparisons meanwhile
                raise

    def _image(self, file: str) -> torch.Tensor:
        pixels = np.asarray(Image.open(io.BytesIO(self._get(f"images/{file}"))).convert("RGB"))
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255

    def _get(self, path: str) -> bytes:
        with urllib.request.urlopen(self._url + path, timeout=60) as answer:
            return answer.read()

    def _post(self, path: str, content: Any) -> None:
        body, headers = json.dumps(content).encode(), {"Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers), timeout=60) as answer:
            answer.read()
