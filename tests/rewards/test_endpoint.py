"""Calls of a server that is slow, dies, answers nonsense, and refuses: what is asked again, and what a failure says."""

from __future__ import annotations

import email.utils
import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
from loopback import Loopback, Reply

from rlcm_fast.rewards import endpoint
from rlcm_fast.rewards.endpoint import BadAnswer, CallFailed, Calls, Endpoint
from rlcm_fast.rewards.outcomes import Failed

GOOD = Reply({"value": 7})


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The waits between attempts, which are noted instead of slept."""
    waits: list[float] = []

    class Clock:
        monotonic, time = time.monotonic, time.time

        @staticmethod
        def sleep(seconds: float) -> None:
            waits.append(seconds)

    monkeypatch.setattr(endpoint, "time", Clock)
    return waits


def value_of(answer: Any) -> int:
    if not isinstance(answer, dict) or "value" not in answer:
        raise BadAnswer("answered no value")
    return answer["value"]


def loopback(*replies: Reply) -> Loopback:
    """A server that answers with the replies in turn, and with the last one for ever."""
    return Loopback(lambda body, number: replies[min(number, len(replies) - 1)], {})


def ask(server: Loopback, **calls: Any) -> int:
    return Endpoint(server.url, Calls.of({"timeout_s": 1.0, **calls})).ask("/ask", lambda: {"question": 1}, value_of)


@pytest.mark.parametrize(
    "bad",
    [
        Reply("busy", 429),
        Reply("busy", 503),
        Reply("broken", 500),
        Reply("slow", 408),
        Reply(json.dumps({"value": 7, "text": "x" * 99}).encode()[:40]),  # whole, but half a JSON
        Reply({"value": 7, "text": "x" * 99}, dies_after=40),
        Reply({"value": 7}, dies_after=0),
        Reply(b"<html>not found</html>"),
        Reply({"other": 1}),
        Reply([]),
        Reply(None),
    ],
    ids=lambda reply: f"{reply.status}-{reply.data()[:12]!r}-{reply.dies_after}",
)
def test_what_may_pass_is_asked_again(bad: Reply):
    with loopback(bad, bad, GOOD) as server:
        assert ask(server) == 7
        assert server.posts == [("/ask", {"question": 1})] * 3


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422])
def test_a_request_that_is_wrong_is_not_repeated(status: int):
    with loopback(Reply({"error": {"message": "no\nsuch  model"}}, status)) as server:
        with pytest.raises(CallFailed, match=rf"answered {status}: .*no.*such .* \(1 attempt in 0 s\)") as caught:
            ask(server)
        assert len(server.posts) == 1 and "\n" not in str(caught.value)


def test_what_stays_broken_fails_after_the_last_attempt_and_says_so():
    with (
        loopback(Reply("broken", 500)) as server,
        pytest.raises(CallFailed, match=r'http://127.0.0.1:\d+ answered 500: "broken" \(3 attempts in 0 s\)'),
    ):
        ask(server, attempts=3)
    assert len(server.posts) == 3


@pytest.mark.parametrize("slow", [Reply({"value": 7}, after_s=3), Reply({"value": 7}, drip_s=0.25)])
def test_an_attempt_ends_in_time_whether_the_server_says_nothing_or_drips(slow: Reply):
    with loopback(slow, GOOD) as server:
        start = time.monotonic()
        assert ask(server, timeout_s=0.2) == 7
        assert time.monotonic() - start < 2  # the slow answer would take 3


def test_a_server_that_is_not_there_fails_with_the_reason():
    with loopback(GOOD) as server:
        pass
    with pytest.raises(CallFailed, match=r"broke off: .*refused.* \(2 attempts"):
        ask(server, attempts=2)


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(endpoint, "MOST_ANSWER_BYTES", 1000)
    with loopback(Reply(b"x" * 2000)) as server, pytest.raises(CallFailed, match="answered more than 1000 bytes"):
        ask(server, attempts=1)


def test_waits_grow_and_are_bounded(short_waits: list[float]):
    with loopback(Reply("broken", 500)) as server, pytest.raises(CallFailed):
        ask(server, attempts=10)
    longest = [0.5, 1, 2, 4, 8, 16, 30, 30, 30]
    assert len(short_waits) == 9
    assert all(bound / 2 <= wait <= bound for wait, bound in zip(short_waits, longest, strict=True))


@pytest.mark.parametrize(
    ("header", "at_least", "at_most"),
    [
        ("7", 7, 7),
        ("1000", 60, 60),
        ("-3", 0, 0.5),
        ("nonsense", 0, 0.5),
        (email.utils.formatdate(time.time() + 3600, usegmt=True), 60, 60),
        (email.utils.formatdate(time.time() - 3600, usegmt=True), 0, 0.5),
    ],
    ids=("seconds", "too many seconds", "negative", "nonsense", "a date to come", "a date that has passed"),
)
def test_retry_after_lengthens_the_wait(short_waits: list[float], header: str, at_least: float, at_most: float):
    with loopback(Reply("busy", 429, {"Retry-After": header}), GOOD) as server:
        assert ask(server) == 7
    (wait,) = short_waits
    assert at_least <= wait <= at_most


def test_waits_do_not_touch_the_random_numbers_of_the_run():
    import random

    random.seed(0)
    before = random.getstate()
    with loopback(Reply("busy", 429), GOOD) as server:
        ask(server)
    assert random.getstate() == before


def delayed(body: Any, number: int) -> Reply:
    """Later questions are answered earlier; question 3 never."""
    if body["question"] == 3:
        return Reply("broken", 500)
    return Reply({"value": body["question"]}, after_s=0.005 * (8 - body["question"]))


def questions(one: Endpoint, numbers: range) -> list[Callable[[], int]]:
    return [partial(one.ask, "/ask", lambda number=number: {"question": number}, value_of) for number in numbers]


def test_answers_keep_the_order_failures_stay_alone_and_few_are_asked_at_once():
    with Loopback(delayed, {}) as server:
        one = Endpoint(server.url, Calls.of({"at_once": 3, "attempts": 2}))
        with ThreadPoolExecutor(4) as threads:  # as workers of a rollout that share one reward
            answers = list(threads.map(lambda _: one.each(questions(one, range(8))), range(4)))
        assert server.most_at_once == 3
        assert len(server.posts) == 4 * (8 + 1)
    for of_one in answers:
        assert isinstance(of_one[3], Failed) and "answered 500" in of_one[3].problem
        assert [answer for answer in of_one if not isinstance(answer, Failed)] == [0, 1, 2, 4, 5, 6, 7]


def test_a_mistake_of_ours_is_no_failure_of_the_server():
    with loopback(GOOD) as server:
        one = Endpoint(server.url, Calls())
        mistake = partial(one.ask, "/ask", lambda: {"question": 1 // 0}, value_of)
        with pytest.raises(ZeroDivisionError):
            one.each([mistake])


def test_the_key_is_read_from_the_environment_and_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_KEY", "secret")
    with loopback(GOOD) as server:
        ask(server, api_key_variable="MY_KEY")
        assert server.headers[0]["Authorization"] == "Bearer secret"


def test_a_server_on_this_machine_is_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with loopback(GOOD) as server:
        assert ask(server, attempts=1) == 7
    elsewhere = Endpoint("http://reward.invalid", Calls.of({"attempts": 1}))
    with pytest.raises(CallFailed, match="refused"):  # by the proxy that is not there; no name was looked up
        elsewhere.ask("/ask", dict, value_of)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"timeout": 3}, "calls.timeout is unknown; calls takes timeout_s, attempts, at_once, api_key_variable"),
        ({"timeout_s": 0}, "calls.timeout_s=0 is not allowed; give a number above 0"),
        ({"timeout_s": float("nan")}, "calls.timeout_s=nan"),
        ({"attempts": 0}, "calls.attempts=0 is not allowed; give a whole number of 1 or more"),
        ({"at_once": 2.5}, "calls.at_once=2.5"),
        ({"at_once": True}, "calls.at_once=True"),
        ({"api_key_variable": "NO_SUCH_KEY"}, "calls.api_key_variable=NO_SUCH_KEY is not set in the environment"),
        ([1], r"calls=\[1\] is no mapping"),
    ],
)
def test_wrong_settings_are_named(settings: Any, problem: str):
    with pytest.raises(ValueError, match=problem):
        Calls.of(settings)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://host/x", "http://", "/v1"])
def test_a_url_that_names_no_server_is_refused(url: str):
    with pytest.raises(ValueError, match=r"url=.* is no address.*; give one such as http://127.0.0.1:8000"):
        Endpoint(url, Calls())
