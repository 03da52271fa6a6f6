"""Serves a reward over HTTP: the application that `rlcm-fast reward-server` runs by uvicorn; protocol.py has its pages.

It is one process with one thread that scores (batcher.py), and others that read requests. A client that hangs up takes
its waiting images with it, so repeated requests do not pile up.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlcm_fast.rewards.batcher import Batcher, Busy
from rlcm_fast.rewards.outcomes import Outcome
from rlcm_fast.rewards.protocol import VERSION, Refused, answer_of, read_request

RETRY_AFTER_S = 2
_LOOKS_UP_S = 1.0  # how often a waiting request looks whether its client is still there


@dataclass(frozen=True)
class Service:
    """What is served."""

    name: str  # the reward
    batcher: Batcher
    about: Mapping[str, Any]  # device, batch_size, used: for /health
    most_bytes: int  # of a request's body
    key: str = ""  # that a request must bear; empty: none


def application(service: Service) -> Starlette:
    """The pages /health, /metrics and /score; when it shuts down it scores what waits."""
    statuses: Counter[int] = Counter()

    # What the server is and does.
    async def health(request: Request) -> Response:
        about = {"protocol": VERSION, "reward": service.name, **service.about, "most_bytes": service.most_bytes}
        return JSONResponse(about)

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(_metrics(service.batcher, statuses))

    # What it is for.
    async def score(request: Request) -> Response:
        try:
            response = await _score(service, request)
        except Refused as refused:
            response = _error(refused.status, str(refused))
        except Busy as busy:
            response = _error(503, f"{busy}; come back later", {"Retry-After": str(RETRY_AFTER_S)})
        except ClientDisconnect:
            response = Response(status_code=499)  # nobody reads it
        statuses[response.status_code] += 1
        return response

    # Its end, and the key before all pages.
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.batcher.close)

    pages = [Route("/health", health), Route("/metrics", metrics), Route("/score", score, methods=["POST"])]
    app = Starlette(routes=pages, lifespan=lifespan)
    app.add_middleware(_NeedsKey, key=service.key)
    return app


class _NeedsKey:
    """Answers 401 to requests without the key."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._wanted = app, f"Bearer {key}".encode() if key else b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and self._wanted:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, self._wanted):
                await _error(401, "the key is missing or wrong")(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _score(service: Service, request: Request) -> Response:
    """Reads a request, has its images scored, and answers; raises Refused, Busy or ClientDisconnect."""
    data = await _body(request, service.most_bytes)
    asked = await asyncio.to_thread(read_request, data, service.name)
    outcomes = service.batcher.submit(asked.pixels, asked.prompts)
    return JSONResponse(answer_of(service.name, await _all(outcomes, request)))


async def _body(request: Request, most_bytes: int) -> bytes:
    """The body of a request; raises Refused as soon as it is known to be too large."""
    problem = f"the body is larger than {most_bytes} bytes; send fewer images at once"
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > most_bytes:
        raise Refused(413, problem)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most_bytes:
            raise Refused(413, problem)
    return bytes(body)


async def _all(futures: Sequence[Future[Outcome]], request: Request) -> list[Outcome]:
    """The results, in order; raises ClientDisconnect, and cancels what waits, if the client hangs up before."""
    waiting = [asyncio.wrap_future(future) for future in futures]
    try:
        while True:
            _, pending = await asyncio.wait(waiting, timeout=_LOOKS_UP_S)
            if not pending:
                return [future.result() for future in waiting]
            if await request.is_disconnected():
                raise ClientDisconnect
    finally:
        for future in waiting:
            future.cancel()


def _error(status: int, problem: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"error": problem}, status_code=status, headers=headers)


def _metrics(batcher: Batcher, statuses: Mapping[int, int]) -> str:
    """The counters in the text format of Prometheus."""
    counts = batcher.counts
    numbers = {
        "images_total": counts.images,
        "failed_images_total": counts.failed_images,
        "batches_total": counts.batches,
        "scoring_seconds_total": counts.scoring_seconds,
        "waiting_images": batcher.num_waiting,
    }
    lines = []
    for name, value in numbers.items():
        kind = "counter" if name.endswith("_total") else "gauge"
        lines += [f"# TYPE rlcm_fast_reward_{name} {kind}", f"rlcm_fast_reward_{name} {value}"]
    lines.append("# TYPE rlcm_fast_reward_requests_total counter")
    lines += [f'rlcm_fast_reward_requests_total{{status="{status}"}} {statuses[status]}' for status in sorted(statuses)]
    return "\n".join(lines) + "\n"
