"""Asks a vision-language model about pictures over an OpenAI-compatible endpoint: vLLM, SGLang, or a paid one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from rlcm_fast.rewards.endpoint import BadAnswer, CallFailed, Calls, Endpoint
from rlcm_fast.rewards.outcomes import Failed

T = TypeVar("T")
_LISTS_NO_MODELS = {404, 405, 501}  # what a server answers that is there, and has chat only


@dataclass(frozen=True)
class Question:
    """A text about a picture."""

    text: str
    picture_url: Callable[[], str]  # makes the data URL of the picture when its turn comes


class Chat:
    """A model behind `url`/chat/completions."""

    def __init__(self, url: str, model: str, calls: Mapping[str, Any] | None) -> None:
        """url: the base, which ends in /v1 as a rule. Asks the server for its models once.

        Raises ValueError if the server is not there, or says that it does not know the model.
        """
        if not model or not isinstance(model, str):
            raise ValueError(f"model={model!r} is empty; give the name under which the server knows the model")
        self._model = model
        self._endpoint = Endpoint(url, Calls.of(calls))
        self._check_model(url)

    def ask_all(
        self, questions: Sequence[Question], request: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T]
    ) -> list[T | Failed]:
        """What `read` makes of the first choice of each answer, or why there is none, in the order of the questions.

        request: fields of the request beside model and messages. read: raises BadAnswer.
        """

        def score(answer: Any) -> T:
            return read(_first_choice(answer))

        bodies = [partial(self._body, question, request) for question in questions]
        return self._endpoint.each([partial(self._endpoint.ask, "/chat/completions", body, score) for body in bodies])

    def _body(self, question: Question, request: Mapping[str, Any]) -> dict[str, Any]:
        picture = {"type": "image_url", "image_url": {"url": question.picture_url()}}
        content = [picture, {"type": "text", "text": question.text}]
        return {"model": self._model, "messages": [{"role": "user", "content": content}], **request}

    def _check_model(self, url: str) -> None:
        try:
            listed = self._endpoint.get("/models")
            names = [entry["id"] for entry in listed["data"]]
        except CallFailed as error:
            if error.status in _LISTS_NO_MODELS:
                return
            raise ValueError(f"url={url} {error}; start the server first, or correct url") from error
        except (BadAnswer, KeyError, TypeError) as error:
            raise ValueError(f"url={url} is no OpenAI-compatible endpoint; give its base, such as HOST/v1") from error
        if self._model not in names:
            known = ", ".join(map(str, names[:8])) or "none"
            raise ValueError(f"model={self._model} is not served at {url}; it serves {known}")


def _first_choice(answer: Any) -> Mapping[str, Any]:
    try:
        choice = answer["choices"][0]
    except (KeyError, IndexError, TypeError) as error:
        raise BadAnswer("answered JSON without choices") from error
    if not isinstance(choice, Mapping):
        raise BadAnswer("answered a choice that is no object")
    return choice
