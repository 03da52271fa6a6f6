"""What a vision-language model is asked for, and how its answer becomes a score in [0, 1].

    yes_no    one token; P(yes) / (P(yes) + P(no)), each summed over all spellings among the 20 likeliest tokens;
              with value: p_yes, P(yes) alone, as VQAScore (arXiv 2404.01291)
    number    the last number behind the tag, divided by `highest`
    axes      a number behind each of several tags, divided by `highest`, averaged with the axes' weights

A tag T stands as <T>4</T>, "T: 4", "**T:** 4", "T Score: 4", "T (1-5): 4" or "T: 4/5"; letter case does not matter.
The last one counts, as models repeat the task before they answer. A number outside [lowest, highest] or after it
another bound than `highest`, and probabilities that yes and no hardly share in, are no scores: BadAnswer.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rlcm_fast.rewards.endpoint import BadAnswer, check_number, check_whole, from_mapping

TOP_LOG_PROBS = 20  # the most that vLLM, SGLang and OpenAI give unless told otherwise
LEAST_MASS = 0.01
"""The least P(yes) + P(no): below it the ratio is that of two accidents, as of a model that begins with a heading."""
_MARKS_OF_SPACE = "\u2581\u0120"  # in the tokens of SentencePiece and of byte-level BPE
_NUMBER = r"(?P<number>\d+(?:\.\d+)?)(?![\w]|[.,]\d|\s*-\s*\d)(?:\s*(?:/|out\s+of)\s*(?P<of>\d+))?"


class Answer(Protocol):
    """One kind of answer."""

    def request(self) -> dict[str, Any]:
        """The fields of the request that ask for it."""
        ...

    def read(self, choice: Mapping[str, Any]) -> float:
        """The score in [0, 1] of the server's first choice; raises BadAnswer."""
        ...


@dataclass(frozen=True)
class YesNo:
    """Yes or no, by the probabilities of the first token."""

    kind: str = "yes_no"
    value: Literal["ratio", "p_yes"] = "ratio"

    def __post_init__(self) -> None:
        if self.value not in ("ratio", "p_yes"):
            raise ValueError(f"answer.value={self.value} is unknown; give ratio or p_yes")

    def request(self) -> dict[str, Any]:
        return {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": TOP_LOG_PROBS}

    def read(self, choice: Mapping[str, Any]) -> float:
        # Sum up the spellings of both words.
        try:
            tokens = choice["logprobs"]["content"][0]["top_logprobs"]
            pairs = [(_word(token["token"]), _probability(token["logprob"])) for token in tokens]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise BadAnswer("answered without top_logprobs; serve a model whose server gives them") from error
        yes, no = (math.fsum(p for word, p in pairs if word == wanted) for wanted in ("yes", "no"))

        # Compare them, if the model means either.
        if yes + no < LEAST_MASS:
            likeliest = max(pairs, key=lambda pair: pair[1], default=("nothing", 0.0))[0]
            raise BadAnswer(
                f"answered yes or no with a probability of {yes + no:.2g}, and likeliest {likeliest!r}; end the "
                "question with a demand such as: Please answer Yes or No."
            )
        return min(yes, 1.0) if self.value == "p_yes" else yes / (yes + no)


@dataclass(frozen=True)
class Number:
    """A number behind a tag."""

    kind: str = "number"
    tag: str = "Score"
    lowest: float = 1.0
    highest: float = 5.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        _check_scale(self.lowest, self.highest, self.max_tokens)
        if not isinstance(self.tag, str) or not self.tag.strip():
            raise ValueError(f"answer.tag={self.tag!r} is empty; give the word before the number, such as Score")

    def request(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": 0}

    def read(self, choice: Mapping[str, Any]) -> float:
        return tagged_number(_text(choice), self.tag, self.lowest, self.highest) / self.highest


@dataclass(frozen=True)
class Axes:
    """Numbers behind several tags, each with a weight."""

    kind: str = "axes"
    axes: Mapping[str, float] = field(default_factory=dict)
    lowest: float = 1.0
    highest: float = 5.0
    max_tokens: int = 512

    def __post_init__(self) -> None:
        _check_scale(self.lowest, self.highest, self.max_tokens)
        if not isinstance(self.axes, Mapping) or not self.axes:
            raise ValueError(
                f"answer.axes={self.axes!r} names no axis; give tags and weights: {{Alignment: 1, Style: 0.5}}"
            )
        for tag, weight in self.axes.items():
            check_number(f"answer.axes.{tag}", weight, above=0.0)

    def request(self) -> dict[str, Any]:
        return {"max_tokens": self.max_tokens, "temperature": 0}

    def read(self, choice: Mapping[str, Any]) -> float:
        text = _text(choice)
        values = {tag: tagged_number(text, tag, self.lowest, self.highest) for tag in self.axes}
        total = math.fsum(weight * values[tag] for tag, weight in self.axes.items())
        return total / math.fsum(self.axes.values()) / self.highest


KINDS: dict[str, type[YesNo] | type[Number] | type[Axes]] = {"yes_no": YesNo, "number": Number, "axes": Axes}


def answer_of(settings: Mapping[str, Any] | str) -> Answer:
    """Makes what `answer` names: a kind, or a mapping with `kind` and the settings of that kind; raises ValueError."""
    settings = {"kind": settings} if isinstance(settings, str) else settings
    kind = settings.get("kind") if isinstance(settings, Mapping) else None
    if kind not in KINDS:
        raise ValueError(f"answer={settings!r} has no known kind; give {', '.join(KINDS)}, as in {{kind: yes_no}}")
    return from_mapping(KINDS[kind], settings, "answer")


def tagged_number(text: str, tag: str, lowest: float, highest: float) -> float:
    """The last number behind `tag` in `text`; raises BadAnswer if there is none in [lowest, highest]."""
    name = re.escape(tag.strip()).replace(r"\ ", r"\s+")
    marks = r"[\s*_`\"']*"
    scale = r"(?:\s*\(\s*\d+\s*-\s*\d+\s*\))?"
    forms = rf"<\s*{name}\s*>{marks}{_NUMBER}", rf"(?<!\w){name}(?:\s+score)?{scale}{marks}[:=]{marks}{_NUMBER}"
    found = [match for form in forms for match in re.finditer(form, text, re.IGNORECASE)]
    if not found:
        raise BadAnswer(f"answered without a number behind the tag {tag!r}: {_end_of(text)!r}")
    last = max(found, key=lambda match: match.start())
    number = float(last["number"])
    if not lowest <= number <= highest or (last["of"] is not None and float(last["of"]) != highest):
        raise BadAnswer(f"answered {last[0]!r}, which is no number from {lowest:g} to {highest:g}")
    return number


def _text(choice: Mapping[str, Any]) -> str:
    """The text of the answer; raises BadAnswer if there is none, or if it was cut."""
    try:
        text, reason = choice["message"]["content"], choice.get("finish_reason")
    except (KeyError, TypeError, AttributeError) as error:
        raise BadAnswer("answered a choice without message.content") from error
    if not isinstance(text, str):
        raise BadAnswer("answered a choice without text")
    if reason == "length":
        raise BadAnswer(f"was cut at answer.max_tokens; raise it: {_end_of(text)!r}")
    return text


def _word(token: Any) -> str:
    """The token as a word: without the marks of space and of Markdown, in lower case."""
    return str(token).strip(f" \t\n\r*_`\"'.,!:{_MARKS_OF_SPACE}").lower()


def _probability(log_prob: Any) -> float:
    """Raises ValueError for what is no log-probability."""
    if isinstance(log_prob, bool) or not isinstance(log_prob, int | float) or not log_prob <= 1e-3:
        raise ValueError(f"{log_prob!r} is no log-probability")
    return math.exp(log_prob)


def _end_of(text: str) -> str:
    return " ".join(text.split())[-100:]


def _check_scale(lowest: Any, highest: Any, max_tokens: Any) -> None:
    check_number("answer.lowest", lowest, above=-math.inf)
    check_number("answer.highest", highest, above=0.0)
    check_whole("answer.max_tokens", max_tokens)
    if lowest >= highest:
        raise ValueError(f"answer.lowest={lowest} is not below answer.highest={highest}; give the ends of the scale")
