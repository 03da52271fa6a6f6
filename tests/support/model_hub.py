"""A hub on the loopback that gives away folders of models as the Hugging Face hub does, and notes what it sent."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class ModelHub:
    """`with ModelHub({"me/model": folder}) as hub`: HF_ENDPOINT=hub.url reads the folder's files as they are then."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.sent: list[str] = []  # repository and file of each download
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ModelHub:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def weights_sent(self) -> list[str]:
        return [name for name in self.sent if name.endswith(".safetensors")]

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body."""
        asked = re.fullmatch(r"/api/models/(?P<id>[^/]+/[^/]+?)(/(?P<what>revision|tree)/(?P<of>[^/]+))?", path)
        file = re.fullmatch(r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<of>[^/]+)/(?P<name>.+)", path)
        match = asked or file
        if match is None:
            return (200 if path == "/" else 404), {}, b""  # the hub itself may be asked whether it is there
        folder = self.folders.get(match["id"])
        if folder is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if match["of"] not in (None, "main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if asked:
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps(_listing(match["id"], folder, asked["what"])).encode(),
            )
        place = folder / match["name"]
        if not place.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b"{}"
        content = place.read_bytes()
        return 200, {"ETag": f'"{_digest(content)}"', "X-Repo-Commit": COMMIT}, content

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._send(has_body=False)

            def do_GET(self) -> None:
                self._send(has_body=True)

            def _send(self, has_body: bool) -> None:
                path = unquote(urlsplit(self.path).path)
                status, headers, body = hub._answer(path)
                if has_body and status == 200 and "/resolve/" in path:
                    hub.sent.append(path.replace(f"/resolve/{COMMIT}", "").replace("/resolve/main", "").lstrip("/"))
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if has_body:
                    self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


def _digest(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


def _listing(repository: str, folder: Path, what: str | None) -> object:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [file.relative_to(folder).as_posix() for file in files]
    if what == "tree":
        return [
            {"type": "file", "path": name, "size": file.stat().st_size, "oid": _digest(file.read_bytes())}
            for name, file in zip(names, files, strict=True)
        ]
    return {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
