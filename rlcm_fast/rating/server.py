"""The page on which a person rates: a Starlette application, and the thread that serves it.

    GET  /TOKEN/               the page; /TOKEN/page.css and /TOKEN/page.js belong to it
    GET  /TOKEN/state          what to show, as JSON; ?after=VERSION waits until it changes, 20 seconds at most
    GET  /TOKEN/images/FILE    an image of a question that is asked
    POST /TOKEN/answer         {"id": ID, "tiers": [[0, 2], [1]]}; /skip {"id": ID}, /skip_comparisons, /undo, /stop {}

Only who knows the token sees anything; it is compared in constant time. The Host of a request must be this machine (so
that no page of the web reaches it by a name that it controls), and the Origin of a POST must be the page itself. There
is no CORS, nothing is cached, and the page loads nothing from elsewhere.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from rlcm_fast.finite_json import load_json
from rlcm_fast.rating.session import Session, Unknown

_PAGE = Path(__file__).with_name("page")
_FILES = {
    "": ("page.html", "text/html"),
    "page.css": ("page.css", "text/css"),
    "page.js": ("page.js", "text/javascript"),
}
_MOST_BYTES = 65_536  # of a request
_LONGEST_WAIT = 20.0  # seconds that a request for a change waits
_LOOK_EVERY = 0.05  # seconds
LOCAL = ("localhost", "127.0.0.1", "[::1]")
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Site:
    """What is served, and to whom."""

    session: Session
    folder: Path  # holds the images
    token: str
    hosts: tuple[str, ...] = LOCAL  # names of this machine that a request may have in its Host
    visits: dict[str, float] = field(default_factory=dict)  # when the page last asked for something, monotonic

    @property
    def is_visited(self) -> bool:
        """Tells whether a page is open: it asked for something within two of its longest waits."""
        return time.monotonic() - self.visits.get("last", -1e9) < 2 * _LONGEST_WAIT


def application(site: Site) -> Starlette:
    """Returns the pages."""
    handlers = _Handlers(site)
    posts = {
        "answer": handlers.answer,
        "skip": handlers.skip,
        "skip_comparisons": handlers.skip_comparisons,
        "undo": handlers.undo,
        "stop": handlers.stop,
    }
    routes = [Route(f"/{{token}}/{name}", handlers.file) for name in _FILES]
    routes += [Route("/{token}/state", handlers.state), Route("/{token}/images/{file:path}", handlers.image)]
    routes += [Route(f"/{{token}}/{name}", _posted(handler), methods=["POST"]) for name, handler in posts.items()]
    app = Starlette(routes=routes)
    app.add_middleware(_Guard, site=site)
    return app


class _Handlers:
    """The pages' functions."""

    def __init__(self, site: Site) -> None:
        self._site, self._session = site, site.session

    async def file(self, request: Request) -> Response:
        name, kind = _FILES[request.url.path.rpartition("/")[2]]
        return FileResponse(_PAGE / name, media_type=kind)

    async def state(self, request: Request) -> Response:
        after = request.query_params.get("after", "")
        until = time.monotonic() + _LONGEST_WAIT
        while after == str(self._session.version) and time.monotonic() < until:
            await asyncio.sleep(_LOOK_EVERY)
        return JSONResponse(self._session.view())

    async def image(self, request: Request) -> Response:
        file = request.path_params["file"]
        path = self._site.folder / file
        if not self._session.has_image(file) or not path.is_file():
            return _error(404, "there is no such image")
        return FileResponse(path, media_type="image/png")

    def answer(self, posted: dict[str, Any]) -> None:
        tiers = posted.get("tiers")
        if not isinstance(tiers, list) or not all(isinstance(tier, list) for tier in tiers):
            raise ValueError("tiers must be a list of lists")
        self._session.answer(str(posted.get("id")), tiers)

    def skip(self, posted: dict[str, Any]) -> None:
        self._session.skip(str(posted.get("id")))

    def skip_comparisons(self, posted: dict[str, Any]) -> None:
        self._session.skip_comparisons()

    def undo(self, posted: dict[str, Any]) -> None:
        self._session.undo()

    def stop(self, posted: dict[str, Any]) -> None:
        """Stops the run as SIGTERM does, which the run answers with a checkpoint."""
        if signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.SIG_IGN):
            raise Unknown("this run can only be stopped where it was started")
        os.kill(os.getpid(), signal.SIGTERM)


def _posted(handler: Callable[[dict[str, Any]], None]) -> Callable[[Request], Awaitable[Response]]:
    """Returns the page of a handler: reads the JSON of the request, and answers with the new state or an error."""

    async def page(request: Request) -> Response:
        try:
            posted = await _json_of(request)
            await asyncio.to_thread(handler, posted)
        except Unknown as error:
            return _error(409, str(error))
        except ValueError as error:
            return _error(400, str(error))
        except OSError as error:  # a full disk, above all: nothing was recorded
            return _error(507, f"nothing was recorded: {error.strerror}; free some space, then rate again")
        return JSONResponse({})

    return page


async def _json_of(request: Request) -> dict[str, Any]:
    """Reads the body; raises ValueError if it is no small JSON object."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise ValueError("the body must be application/json")
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MOST_BYTES:
            raise ValueError(f"the body is larger than {_MOST_BYTES} bytes")
    posted = load_json(bytes(body) or b"{}")
    if not isinstance(posted, dict):
        raise ValueError("the body must be a JSON object")
    return posted


class _Guard:
    """Lets through who knows the token and comes from this machine's own page; puts the headers on every answer."""

    def __init__(self, app: Any, site: Site) -> None:
        self._app, self._site = app, site

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                kept = [pair for pair in message.get("headers", []) if pair[0] not in {name for name, _ in own}]
                message = {**message, "headers": [*kept, *own]}
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            self._site.visits["last"] = time.monotonic()
        await (refusal or self._app)(scope, receive, send_with_headers)

    def _refusal(self, scope: Any) -> Response | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        host = headers.get("host", "")
        if _name_of(host) not in self._site.hosts:
            return PlainTextResponse("wrong host", 421)
        token = scope["path"].split("/")[1]
        if not hmac.compare_digest(token.encode(), self._site.token.encode()):
            return PlainTextResponse("not found: open the address that the run printed", 404)
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and origin != f"http://{host}":
            return PlainTextResponse("wrong origin", 403)
        return None


def _name_of(host: str) -> str:
    """Returns a Host without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdecimal() else host).lower()


def _error(status: int, problem: str) -> Response:
    return JSONResponse({"error": problem}, status_code=status)


class Page:
    """The application in a thread of this process."""

    def __init__(self, site: Site, listener: socket.socket) -> None:
        self.site = site
        host, port = listener.getsockname()[:2]
        self._address = (host, port)
        settings = uvicorn.Config(
            application(site), log_level="critical", access_log=False, lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(settings)
        self._listener = listener
        self._thread = threading.Thread(target=self._serve, name="rating_page", daemon=True)
        self._thread.start()

    @property
    def urls(self) -> list[str]:
        """The addresses of the page; with share_on_network first the one for other devices."""
        host, port = self._address
        local = f"http://127.0.0.1:{port}/{self.site.token}/"
        if host == "127.0.0.1":
            return [local]
        others = [name for name in self.site.hosts if name not in LOCAL]
        return [*(f"http://{name}:{port}/{self.site.token}/" for name in others[:1]), local]

    def close(self) -> None:
        """Ends the thread; a page that waits for a change is told first."""
        self._server.should_exit = True
        self._thread.join(timeout=3)
        self._listener.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._listener])


def listen(port: int, shares: bool) -> socket.socket:
    """Returns a socket on the loopback interface, or on all if the page is shared.

    Raises:
        ValueError: the port is taken or not allowed.
    """
    host = "0.0.0.0" if shares else "127.0.0.1"
    try:
        return socket.create_server((host, port), backlog=64)
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python repeats the address in brackets
        raise ValueError(
            f"port={port} of reward human cannot be listened at: {reason}; another run may rate there: give another "
            "port, or 0 for any free one"
        ) from error


def names_in_network() -> tuple[str, ...]:
    """Returns the address and the name by which others in the network reach this machine, as far as it knows them."""
    names = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; a documentation address, to learn which interface is used
            names.append(str(probe.getsockname()[0]))
        except OSError:
            pass
    name = socket.gethostname().lower()
    return (*names, name, f"{name}.local")


def token_in(file: Path) -> str:
    """Returns the token of a run, which an open page keeps across restarts; makes it if there is none."""
    if file.exists():
        token = file.read_text(encoding="ascii", errors="replace").strip()
        if len(token) >= 32:
            return token
    token = secrets.token_urlsafe(32)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as content:
        content.write(token)
    return token
