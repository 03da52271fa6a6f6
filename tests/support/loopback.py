"""A server on the loopback in a thread of the test, which answers as it is told, well or badly, and counts."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    """What the server answers."""

    body: Any = None  # JSON, or bytes that are sent as they are
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    after_s: float = 0.0  # seconds before the answer
    dies_after: int | None = None  # bytes of the body after which the connection breaks
    drip_s: float = 0.0  # seconds between two bytes of the body

    def data(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


class Loopback:
    """`with Loopback(reply) as server`: reply(body of the POST, number of that POST) -> Reply."""

    def __init__(self, reply: Callable[[Any, int], Reply], pages: Mapping[str, Any]) -> None:
        """pages: the JSON of each path of a GET; a Reply is sent as it is."""
        self.posts: list[tuple[str, Any]] = []  # path and body of each POST
        self.headers: list[Mapping[str, str]] = []
        self.most_at_once = 0
        self._at_once = 0
        self._is_stopped = False
        self._lock = threading.Lock()
        self._reply, self._pages = reply, pages
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Loopback:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Closes the port and answers nobody any more, as if the server were killed."""
        self._is_stopped = True
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: Any, headers: Mapping[str, str]) -> Reply:
        with self._lock:
            number = len(self.posts)
            self.posts.append((path, body))
            self.headers.append(headers)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self._reply(body, number)
            time.sleep(reply.after_s)
            return reply
        finally:
            with self._lock:
                self._at_once -= 1

    def page(self, path: str) -> Reply:
        page = self._pages.get(path, Reply("no such page", 404))
        return page if isinstance(page, Reply) else Reply(page)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else a body that follows its head waits 40 ms

            def do_GET(self) -> None:
                self._send(loopback.page(self.path))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self._send(loopback.answer(self.path, body, dict(self.headers)))

            def log_message(self, format: str, *args: object) -> None:
                pass

            def _send(self, reply: Reply) -> None:
                if loopback._is_stopped:
                    self.close_connection = True
                    return
                data = reply.data()
                self.send_response(reply.status)
                for name, value in {"Content-Length": str(len(data)), **reply.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                try:
                    self._send_body(reply, data)
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True

            def _send_body(self, reply: Reply, data: bytes) -> None:
                if reply.drip_s:
                    for index in range(len(data)):
                        self.wfile.write(data[index : index + 1])
                        time.sleep(reply.drip_s)
                    return
                self.wfile.write(data[: reply.dies_after])
                if reply.dies_after is not None:
                    self.close_connection = True

        return Handler
