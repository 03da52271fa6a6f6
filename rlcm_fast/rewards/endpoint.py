"""Calls a server over HTTP for rewards: JSON both ways, bounded in number, time, size and attempts; never pickle.

    attempt -> answer          a JSON object that `read` accepts
            -> worth another   no connection, a broken or late answer, 408, 425, 429, 5xx, JSON that `read` refuses
            -> final           every other status: the request is wrong, and would be wrong again

Between attempts a call waits 0.5, 1, 2, ... at most 30 seconds, shortened by a random part of up to a half, so that
callers who failed together do not return together; a server's Retry-After lengthens the wait, up to a minute. What
remains without an answer after all attempts is a CallFailed, and never a score.
"""

from __future__ import annotations

import email.utils
import functools
import ipaddress
import itertools
import json
import os
import random
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, TypeVar

import httpx2

from rlcm_fast.finite_json import load_json
from rlcm_fast.rewards.outcomes import Failed
from rlcm_fast.rewards.pool import DaemonPool

T = TypeVar("T")
FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_RETRY_AFTER_S = 0.5, 30.0, 60.0
MOST_ANSWER_BYTES = 16 * 2**20
_WORTH_ANOTHER = {408, 425, 429}  # and every 5xx
_TO_CONNECT_S = 10.0


class BadAnswer(ValueError):
    """An answer arrived whole, but does not say what it should."""


class CallFailed(Exception):
    """A call has no answer; the message is one line."""

    def __init__(self, problem: str, status: int = 0, wait_s: float = 0.0) -> None:
        super().__init__(problem)
        self.status = status  # of the answer; 0: there was none
        self.wait_s = wait_s  # what the server asked for

    @property
    def is_final(self) -> bool:
        """Whether another attempt would end in the same way."""
        return 0 < self.status < 500 and self.status not in _WORTH_ANOTHER


@dataclass(frozen=True)
class Calls:
    """How a reward calls its server."""

    timeout_s: float = 60.0  # of one attempt, from the connection to the last byte
    attempts: int = 5
    at_once: int = 8  # calls in flight, for each process of the run
    api_key_variable: str = ""  # the environment variable that holds the key of the server; empty: no key

    @staticmethod
    def of(settings: Mapping[str, Any] | None) -> Calls:
        """Checks the argument `calls` of a reward; raises ValueError."""
        calls = from_mapping(Calls, settings, "calls")
        check_number("calls.timeout_s", calls.timeout_s, above=0.0)
        check_whole("calls.attempts", calls.attempts)
        check_whole("calls.at_once", calls.at_once)
        if not isinstance(calls.api_key_variable, str):
            raise ValueError(f"calls.api_key_variable={calls.api_key_variable} is not allowed; give a variable's name")
        if calls.api_key_variable and not os.environ.get(calls.api_key_variable):
            raise ValueError(
                f"calls.api_key_variable={calls.api_key_variable} is not set in the environment; export it, or leave "
                "it out for a server without a key"
            )
        return calls

    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {os.environ[self.api_key_variable]}"} if self.api_key_variable else {}


class Endpoint:
    """A server under one URL; safe to call from several threads."""

    def __init__(self, url: str, calls: Calls) -> None:
        """Raises ValueError unless `url` begins with http:// or https:// and names a host; connects to nothing."""
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"url={url} is no address: {error}; give one such as http://127.0.0.1:8000") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"url={url} is no address of a server; give one such as http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self._calls = calls
        self._client = httpx2.Client(
            headers=calls.headers(),
            timeout=httpx2.Timeout(calls.timeout_s, connect=min(_TO_CONNECT_S, calls.timeout_s), pool=None),
            verify=_trusted(),
            trust_env=not _is_loopback(parsed.host),  # HTTP_PROXY and NO_PROXY; a proxy does not know this machine
            limits=httpx2.Limits(max_connections=calls.at_once + 1, max_keepalive_connections=calls.at_once + 1),
        )
        self._pool = DaemonPool(calls.at_once, "remote_reward")
        self._random = random.Random()  # its own: waits must not touch the run's random numbers

    def get(self, path: str) -> Any:
        """The JSON at `path`, in one attempt; raises CallFailed or BadAnswer."""
        return _parsed(self._attempt("GET", path, None))

    def ask(self, path: str, make_body: Callable[[], Mapping[str, Any]], read: Callable[[Any], T]) -> T:
        """What `read` makes of the JSON that the server answers to a body; raises CallFailed after the last attempt.

        make_body: is called once, in the thread that calls. read: raises BadAnswer for JSON that it does not accept.
        """
        content, start = json.dumps(make_body()).encode(), time.monotonic()
        for attempt in itertools.count(1):
            try:
                return read(_parsed(self._attempt("POST", path, content)))
            except (CallFailed, BadAnswer) as error:
                is_final = isinstance(error, CallFailed) and error.is_final
                if is_final or attempt == self._calls.attempts:
                    tries = f"{attempt} attempt{'s' if attempt > 1 else ''} in {time.monotonic() - start:.0f} s"
                    raise CallFailed(f"{self.url} {error} ({tries})") from error
                wait_s = error.wait_s if isinstance(error, CallFailed) else 0.0
            self._wait(attempt, wait_s)
        raise AssertionError("the last attempt returns or raises")

    def each(self, calls: Iterable[Callable[[], T]]) -> list[T | Failed]:
        """What the calls of `ask` return, in order, `calls.at_once` at a time; one that raises CallFailed is Failed."""

        def outcome(call: Callable[[], T]) -> T | Failed:
            try:
                return call()
            except CallFailed as error:
                return Failed(str(error))

        return self._pool.run([partial(outcome, call) for call in calls])

    def _attempt(self, method: str, path: str, content: bytes | None) -> bytes:
        """The body of the answer; raises CallFailed."""
        deadline = time.monotonic() + self._calls.timeout_s
        headers = {"Content-Type": "application/json"} if content is not None else {}
        try:
            with self._client.stream(method, self.url + path, content=content, headers=headers) as response:
                answer = _body(response, deadline)
                if response.status_code != 200:
                    raise _refusal(response, answer)
                return answer
        except httpx2.TimeoutException as error:
            raise CallFailed(f"did not answer within {self._calls.timeout_s:g} s") from error
        except httpx2.HTTPError as error:
            raise CallFailed(f"broke off: {str(error) or type(error).__name__}") from error

    def _wait(self, attempt: int, asked_for: float) -> None:
        backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) * self._random.uniform(0.5, 1.0)
        time.sleep(max(backoff, min(asked_for, LONGEST_RETRY_AFTER_S)))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@functools.cache
def _trusted() -> ssl.SSLContext:
    """The certificates that are trusted, read once: 0.1 s each time."""
    return httpx2.create_ssl_context()


def _body(response: httpx2.Response, deadline: float) -> bytes:
    """The bytes of an answer; a server that sends a byte now and then, or no end of them, fails too."""
    chunks, size = [], 0
    for chunk in response.iter_bytes():
        chunks.append(chunk)
        size += len(chunk)
        if size > MOST_ANSWER_BYTES:
            raise CallFailed(f"answered more than {MOST_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            raise httpx2.ReadTimeout("the answer is not complete")
    return b"".join(chunks)


def _refusal(response: httpx2.Response, answer: bytes) -> CallFailed:
    """The failure that a status other than 200 stands for, with the beginning of what the server says."""
    status = response.status_code
    said = " ".join(answer[:1000].decode("utf-8", errors="replace").split())[:200]
    return CallFailed(f"answered {status}: {said or response.reason_phrase}", status, _retry_after(response))


def _retry_after(response: httpx2.Response) -> float:
    """The seconds that the header Retry-After asks for, as a number or a date; 0 without one."""
    value = response.headers.get("Retry-After", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _parsed(answer: bytes) -> Any:
    try:
        return load_json(answer)
    except ValueError as error:
        beginning = " ".join(answer[:80].decode("utf-8", errors="replace").split())
        raise BadAnswer(f"answered what is no JSON: {beginning!r}") from error


def from_mapping(kind: type[T], settings: Mapping[str, Any] | None, field: str) -> T:
    """A dataclass made of an argument that is a mapping; raises ValueError with the known keys for an unknown one."""
    known = [item.name for item in fields(kind)]  # pyright: ignore[reportArgumentType]
    if settings is not None and not isinstance(settings, Mapping):
        raise ValueError(f"{field}={settings!r} is no mapping; give {{{', '.join(known)}}}, each of them optional")
    unknown = [str(key) for key in settings or {} if key not in known]
    if unknown:
        raise ValueError(f"{field}.{unknown[0]} is unknown; {field} takes {', '.join(known)}")
    return kind(**(settings or {}))


def check_number(field: str, value: Any, above: float) -> None:
    """Raises ValueError unless `value` is a number greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not above < value < float("inf"):
        raise ValueError(f"{field}={value!r} is not allowed; give a number above {above:g}")


def check_whole(field: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{field}={value!r} is not allowed; give a whole number of 1 or more")
