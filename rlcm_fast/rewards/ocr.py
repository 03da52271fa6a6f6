"""Reads the text in a picture and compares it with the text that the prompt asks for, by the rule of Flow-GRPO.

    target  the text in the prompt's first pair of double quotes, without spaces, in lower case, n characters
    read    the lines that RapidOCR finds, joined from top to bottom, without spaces, in lower case
    score   1 if target is a part of read, else 1 - min(d, n) / n,   d = edit distance (Levenshtein) of read and target

So the score lies in [0, 1]. With the target "Hello World", reading "HELLO WORLD!" scores 1, "Helo World" 0.9, "Hello"
0.5, "Wrld Hello" 0.2, nothing or an unrelated long text 0.

Differences from the code of Flow-GRPO (arXiv 2505.05470):
1. Curly double quotes count as straight ones.
2. A prompt without a pair of quotes, or with nothing in it, fails for its images (the original crashes);
   `without_quotes: whole` compares with the whole prompt instead.
3. An image that cannot be read because the reader fails has no score; the original scores it 0. Reading nothing in a
   good image is a true 0.
4. Any white space is dropped, not only spaces.

Model: RapidOCR with PP-OCRv6 small, 31 MB ONNX inside the package, Apache-2.0 code and weights; no download. It runs on
the CPU with one thread a call, 0.3 s for 512 pixels and 1.0 s for 1024 on one core, in 0.2 GB; several calls at once
agree bitwise. Alone, this reward gives up the picture for the text: combine it with one for the picture.
"""

# B images, n and m characters

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rlcm_fast.rewards.extras import OnPackage, require
from rlcm_fast.rewards.facts import Facts, Weights
from rlcm_fast.rewards.jpeg import to_uint8
from rlcm_fast.rewards.outcomes import Outcome, outcome_of, scores_of
from rlcm_fast.trajectory import Prompt

_STRAIGHT = str.maketrans(dict.fromkeys("\u201c\u201d\u201e\u201f", '"'))  # curly double quotes, high and low


class Ocr(OnPackage):
    """How much of the text that the prompt asks for can be read in the picture, 0 to 1."""

    scope = "image"
    PACKAGE = ("rapidocr", "rapidocr")
    FACTS = Facts(
        formula="1 if the quoted text is in what is read, else 1 - min(edit distance, n) / n",
        likes="large, plain lettering; alone it gives up the picture around it",
        weights=(Weights("", (), 0.031, "Apache-2.0", where="the package rapidocr"),),
        extra="ocr",
    )

    def __init__(self, without_quotes: Literal["fail", "whole"] = "fail", largest_side: int = 960) -> None:
        """Load the reader. Text is searched in a copy whose larger side is at most `largest_side` pixels.

        `without_quotes` says what a prompt without a quoted text does: its images fail, or the whole prompt is the
        target.
        """
        if without_quotes not in ("fail", "whole"):
            raise ValueError(f"without_quotes={without_quotes} is unknown; give fail or whole")
        if isinstance(largest_side, bool) or not isinstance(largest_side, int) or largest_side < 32:
            raise ValueError(f"largest_side={largest_side!r} is no size in pixels; give 32 or more, such as 960")
        self._takes_whole = without_quotes == "whole"
        self._reader = _reader(largest_side)

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 in [0, 1] of images (B, 3, H, W) float32 in [0, 1]."""
        pixels = to_uint8(images).numpy()
        return scores_of([self._outcome(image, prompt.text) for image, prompt in zip(pixels, prompts, strict=True)])

    def read(self, image: Image.Image) -> list[str]:
        """The lines of text in an image, from top to bottom; empty if there are none."""
        return list(self._reader(image).txts or ())

    def _outcome(self, pixels: Any, prompt: str) -> Outcome:
        def score() -> float:
            target = self._target(prompt)
            return text_score(self.read(Image.fromarray(pixels)), target)

        return outcome_of(score)

    def _target(self, prompt: str) -> str:
        target = quoted(prompt) or (prompt if self._takes_whole else "")
        if not _plain(target):
            raise ValueError(
                "the prompt has no text in double quotes; quote what shall be written, or set ocr's "
                "without_quotes: whole"
            )
        return target


def quoted(prompt: str) -> str:
    """The text in the first pair of double quotes, straight or curly; empty if there is no pair."""
    parts = prompt.translate(_STRAIGHT).split('"')
    return parts[1] if len(parts) > 2 else ""


def text_score(lines: Sequence[str], target: str) -> float:
    """The score of the lines read, in [0, 1]; `target` must hold more than white space."""
    read, wanted = _plain("".join(lines)), _plain(target)
    if wanted in read:
        return 1.0
    return 1 - min(edit_distance(read, wanted), len(wanted)) / len(wanted)


def edit_distance(a: str, b: str) -> int:
    """The least number of inserted, removed and replaced characters that turn `a` into `b` (Levenshtein), O(n m)."""
    previous = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        current = [i]
        for j, right in enumerate(b, start=1):
            current.append(min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (left != right)))
        previous = current
    return previous[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).lower()


def _reader(largest_side: int) -> Any:
    """A RapidOCR with one thread a call whose models are loaded."""
    package = require("rapidocr", "ocr")
    reader = package.RapidOCR(
        params={
            "Global.log_level": "critical",  # it prints a warning for each image without text
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
            "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            "Det.limit_type": "max",
            "Det.limit_side_len": largest_side,
        }
    )
    # It loads each of its three models when a picture needs it: better now than in the first iteration.
    picture = Image.new("RGB", (128, 64), "white")
    ImageDraw.Draw(picture).text((16, 16), "Ready", fill="black", font=ImageFont.load_default(24))
    reader(picture)
    return reader
