"""Asks a vision-language model on a server how well a picture fits its prompt, or anything else about it.

    score = answer.read(model(picture, question)), in [0, 1]     kinds of answers: judge_answers.py

The server is any OpenAI-compatible endpoint: vLLM or SGLang beside the training, or a paid service. One request per
image: the question, the picture as PNG, temperature 0. Requests go out `calls.at_once` at a time; what fails is asked
again `calls.attempts` times in all, with growing waits. An image whose requests all fail has no score, and only that
image: a failure is never scored 0, as it is in Flow-GRPO and others.

With the defaults the score is P(yes) / (P(yes) + P(no)) of VQAScore's question (arXiv 2404.01291). For UnifiedReward
(arXiv 2503.05236) take {kind: number, tag: Final Score}, for UnifiedReward 2.0 {kind: axes, axes: {Alignment: 1,
Coherence: 1, Style: 1}}, with the questions of their model cards.

Model and licence: the user's choice; memory here: none. A test value: log-probabilities log 0.6 of "Yes", log 0.1 of
" yes", log 0.2 of "no" and the rest elsewhere score 0.7 / 0.9 = 0.778. Judges like what they were trained to like, and
can be fooled: watch another reward that you do not train on.
"""

# B images

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from rlcm_fast.rewards.chat import Chat, Question
from rlcm_fast.rewards.encoding import png_url, to_pictures
from rlcm_fast.rewards.endpoint import Calls, check_whole
from rlcm_fast.rewards.facts import Facts
from rlcm_fast.rewards.judge_answers import answer_of
from rlcm_fast.rewards.models import ModelFiles, OnModels
from rlcm_fast.rewards.outcomes import scores_of
from rlcm_fast.trajectory import Prompt

QUESTION = 'Does this figure show "{prompt}"? Please answer Yes or No.'
MOST_PIXELS = 1024 * 1024


class VlmJudge(OnModels):
    """The judgement of a vision-language model on a server, 0 to 1."""

    scope = "image"
    asks_server = True
    FACTS = Facts(
        formula="P(yes) / (P(yes) + P(no)), or a number in the answer divided by the highest",
        likes="what the model was trained to like; a question can be answered without looking closely",
        weights=(),
    )

    def __init__(
        self,
        url: str,
        model: str,
        question: str = QUESTION,
        answer: Mapping[str, Any] | str = "yes_no",
        calls: Mapping[str, Any] | None = None,
    ) -> None:
        """Ask the server at `url` (http://HOST:PORT/v1) whether it serves `model`.

        question: the text beside the picture, with {prompt} where the prompt goes. answer: yes_no, or a mapping with
        `kind` (yes_no, number, axes) and the settings of that kind. calls: timeout_s, attempts, at_once,
        api_key_variable, most_pixels (a larger picture is reduced before it is sent).
        """
        self._most_pixels, settings = _checked(question, answer, calls)
        self._question = question
        self._answer = answer_of(answer)
        self._chat = Chat(url, model, settings)
        self._used = {"url": url, "model": model, "question": question, "answer": answer}

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """No files; raises ValueError for settings that are wrong whatever the server says."""
        _checked(arguments["question"], arguments["answer"], arguments["calls"])
        return []

    @property
    def used(self) -> dict[str, Any]:
        """The server, its model, and what it is asked, as JSON."""
        return self._used

    def __call__(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """The scores (B,) float32 in [0, 1] of images (B, 3, H, W) float32 in [0, 1]."""
        pictures = to_pictures(images, self._most_pixels)
        questions = [self._ask(picture, prompt.text) for picture, prompt in zip(pictures, prompts, strict=True)]
        return scores_of(self._chat.ask_all(questions, self._answer.request(), self._answer.read))

    def _ask(self, picture: Image.Image, prompt: str) -> Question:
        return Question(self._question.replace("{prompt}", prompt), lambda: png_url(picture))


def _checked(question: Any, answer: Any, calls: Any) -> tuple[int, dict[str, Any]]:
    """Checks the settings; returns calls.most_pixels, and calls without it. Raises ValueError."""
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"question={question!r} is empty; give a text, with {{prompt}} where the prompt goes")
    answer_of(answer)
    if calls is not None and not isinstance(calls, Mapping):
        raise ValueError(f"calls={calls!r} is no mapping; give such as {{timeout_s: 60, attempts: 5, at_once: 8}}")
    settings = dict(calls or {})
    most_pixels = settings.pop("most_pixels", MOST_PIXELS)
    check_whole("calls.most_pixels", most_pixels)
    Calls.of(settings)
    return most_pixels, settings
