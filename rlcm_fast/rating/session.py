"""What a person is asked, and what they answered: rounds of prompts, one after another, from several threads.

    trainer's thread    open_round -> is_settled (again and again) -> take
    page's threads      view, answer, skip, undo

Comparisons with the start model come first, and the run does not wait for them. A round is settled once all its prompts
are answered and the time for an undo is over: `undo_seconds` after its last answer, or at the next answer. Answers of
an earlier start count for the same images, so that a round goes on in its middle.
"""

from __future__ import annotations

import random
import secrets
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rlcm_fast.rating.ranks import ranks_of
from rlcm_fast.rating.records import Journal, Kind, Rating, now
from rlcm_fast.rating.win_rate import WinRate, win_rates

_AHEAD = 4  # questions whose images the page loads in advance
_LONGEST_PAUSE = 120.0  # seconds between two answers that still count as rating


class Unknown(ValueError):
    """What the page asks for is gone: another tab answered it, or the round is over."""


@dataclass(frozen=True)
class Question:
    """The images of one prompt; a comparison has two, of the tuned and of the start model."""

    id: str
    round: int
    kind: Kind
    prompt: str
    task: str
    images: tuple[str, ...]  # files, relative to the folder of the ratings
    size: tuple[int, int]  # width and height of an image

    @property
    def order(self) -> list[int]:
        """The order in which the page shows the images; a comparison hides which is which."""
        order = list(range(len(self.images)))
        if self.kind == "comparison":
            random.Random(self.id).shuffle(order)
        return order


@dataclass
class _Round:
    key: str
    number: int
    questions: list[Question]
    is_taken: bool = False


@dataclass(frozen=True)
class Plan:
    """How many rounds there will be, and how long an answer can be taken back."""

    num_rounds: int
    undo_seconds: float = 3.0


@dataclass
class _Pace:
    """When things happened, to tell how long they take; in seconds of the monotonic clock."""

    question: Question | None = None  # that is asked
    asked: float = field(default_factory=time.monotonic)  # since when, or since when a page shows it
    is_shown: bool = False
    answered: float = 0.0
    took: list[float] = field(default_factory=list)  # by each answer
    waited: list[float] = field(default_factory=list)  # without anything to rate


class Session:
    """The questions of a run; all methods may be called from any thread."""

    def __init__(self, journal: Journal, plan: Plan) -> None:
        self._journal, self._plan = journal, plan
        self._lock = threading.RLock()
        self._rounds: list[_Round] = []
        self._comparisons: list[Question] = []
        self._undoable: list[Question] = []
        self._pace = _Pace()
        self._id, self._version = secrets.token_hex(8), 0
        self._end = ""  # why nothing more comes

    # The trainer's side.

    def open_round(self, key: str, questions: Sequence[Question]) -> None:
        """Asks the questions of a round, except those that an earlier start answered; `key` names it for the others."""
        with self._lock:
            if self._pace.answered and self._next() is None:
                self._pace.waited.append(time.monotonic() - self._pace.answered)
            opened = _Round(key, questions[0].round, list(questions))
            self._rounds = [*(one for one in self._rounds if not one.is_taken), opened]
            self._changed()

    def open_comparisons(self, questions: Sequence[Question]) -> None:
        """Asks for comparisons with the start model, instead of those of an earlier evaluation."""
        with self._lock:
            self._comparisons = list(questions)
            self._changed()

    def is_settled(self, key: str) -> bool:
        """Tells whether the round is answered and its last answer cannot be taken back any more."""
        with self._lock:
            questions = self._round(key).questions
            if any(self._answer_of(question) is None for question in questions):
                return False
            may_undo = bool(self._undoable) and self._undoable[-1] in questions
            return not may_undo or time.monotonic() - self._pace.answered >= self._plan.undo_seconds

    def take(self, key: str) -> list[Rating]:
        """Returns the answers of a settled round in the order of its questions; they cannot be taken back from here."""
        with self._lock:
            taken = self._round(key)
            taken.is_taken = True
            self._undoable = [question for question in self._undoable if question not in taken.questions]
            self._changed()
            answers = [self._answer_of(question) for question in taken.questions]
            return [answer for answer in answers if answer is not None]

    def close(self, why: str) -> None:
        """Tells the page that nothing more comes."""
        with self._lock:
            self._end = why
            self._changed()

    def is_comparing(self) -> bool:
        """Tells whether a comparison with the start model is still open."""
        with self._lock:
            return any(self._answer_of(question) is None for question in self._comparisons)

    @property
    def idle_seconds(self) -> float:
        """How long the same has been asked."""
        return time.monotonic() - self._pace.asked

    def win_rates(self) -> list[WinRate]:
        """Returns how often the tuned model won against the start, by round."""
        with self._lock:
            return win_rates(self._journal.answers.values())

    # The page's side.

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self._version

    def answer(self, id_: str, tiers: Sequence[Sequence[int]]) -> None:
        """Records the order of a question's images; tiers hold places on the page, best first, ties together.

        Raises:
            Unknown: the question is not open any more.
            ValueError: the tiers are none.
            OSError: the disk is full; nothing is recorded.
        """
        with self._lock:
            question = self._open(id_)
            ranks = ranks_of([list(tier) for tier in tiers], len(question.images))
            placed = [0] * len(ranks)
            for place, image in enumerate(question.order):
                placed[image] = ranks[place]
            self._record(question, tuple(placed))

    def skip(self, id_: str) -> None:
        """Records that a question stays without an answer; raises as `answer` does."""
        with self._lock:
            self._record(self._open(id_), None)

    def skip_comparisons(self) -> None:
        """Drops the comparisons that are still open; they are not recorded."""
        with self._lock:
            self._comparisons = [question for question in self._comparisons if self._answer_of(question)]
            self._changed()

    def undo(self) -> None:
        """Takes back the last answer; raises Unknown if there is none that could be taken back."""
        with self._lock:
            if not self._undoable:
                raise Unknown("there is no answer to take back: the run has learned from the last one")
            self._journal.undo(self._undoable[-1].id)
            self._undoable.pop()
            self._changed()

    def view(self) -> dict[str, Any]:
        """Returns what the page shows, as JSON."""
        with self._lock:
            question = self._next()
            if question is not None and not self._pace.is_shown:
                self._pace.asked, self._pace.is_shown = time.monotonic(), True
            rounds = [one for one in self._rounds if not one.is_taken]
            rated = [rating for rating in self._journal.answers.values() if rating.kind == "ranking"]
            return {
                "session": self._id,
                "version": self._version,
                "end": self._end,
                "question": None if question is None else self._shown(question),
                "next": [_files(other) for other in self._upcoming()[1:_AHEAD]],
                "can_undo": bool(self._undoable),
                "round": rounds[0].number + 1 if rounds else None,
                "num_rounds": self._plan.num_rounds,
                "rounds_ready": len([one for one in rounds if any(self._answer_of(q) is None for q in one.questions)]),
                "rated": {"prompts": len(rated), "images": sum(len(rating.images) for rating in rated)},
                "median_seconds": _median(self._pace.took),
                "wait_seconds": _median(self._pace.waited),
                "win_rates": [rate.shown for rate in self.win_rates()],
            }

    def has_image(self, file: str) -> bool:
        """Tells whether the page may see this file: it is an image of a question that was asked since the start."""
        with self._lock:
            questions = [question for one in self._rounds for question in one.questions]
            return any(file in question.images for question in (*questions, *self._comparisons, *self._undoable))

    # Inside the lock.

    def _answer_of(self, question: Question) -> Rating | None:
        """Returns the answer to these very images."""
        answer = self._journal.answers.get(question.id)
        return answer if answer is not None and answer.images == question.images else None

    def _upcoming(self) -> list[Question]:
        questions = [question for one in self._rounds if not one.is_taken for question in one.questions]
        return [question for question in (*self._comparisons, *questions) if self._answer_of(question) is None]

    def _next(self) -> Question | None:
        return next(iter(self._upcoming()), None)

    def _round(self, key: str) -> _Round:
        return next(one for one in self._rounds if one.key == key)

    def _open(self, id_: str) -> Question:
        for question in self._upcoming():
            if question.id == id_:
                return question
        raise Unknown("these images are answered already, perhaps in another tab")

    def _record(self, question: Question, ranks: tuple[int, ...] | None) -> None:
        seconds = min(time.monotonic() - self._pace.asked, _LONGEST_PAUSE)
        of_question = (question.id, question.round, question.kind, question.prompt, question.task, question.images)
        self._journal.add(Rating(*of_question, ranks, round(seconds, 2), now()))
        self._undoable.append(question)
        if question.kind == "ranking":
            self._pace.took.append(seconds)
        self._pace.answered = time.monotonic()
        self._changed()

    def _changed(self) -> None:
        self._version += 1
        question = self._next()
        if question != self._pace.question:  # a round that opens meanwhile starts no clock anew
            self._pace.question, self._pace.asked, self._pace.is_shown = question, time.monotonic(), False

    def _shown(self, question: Question) -> dict[str, Any]:
        if question.kind == "comparison":
            siblings = self._comparisons
        else:
            siblings = next(one.questions for one in self._rounds if question in one.questions)
        return {
            "id": question.id,
            "kind": question.kind,
            "prompt": question.prompt,
            "images": _files(question),
            "width": question.size[0],
            "height": question.size[1],
            "number": siblings.index(question) + 1,
            "count": len(siblings),
        }


def _files(question: Question) -> list[str]:
    """Returns the files of a question's images in the order of the page."""
    return [question.images[image] for image in question.order]


def _median(seconds: Sequence[float]) -> float | None:
    return round(sorted(seconds)[len(seconds) // 2], 1) if seconds else None
