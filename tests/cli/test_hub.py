"""Uploads to the hub, against a server on the loopback that answers as the hub does."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from rlcm_fast.cli import export
from rlcm_fast.cli.hub import NotUploaded, check_repository, upload
from rlcm_fast.cli.main import build_parser

TOKEN = "hf_of_a_test"


class Hub:
    """What the hub answers to an upload of small files, and what it was sent."""

    def __init__(self, status: int = 200) -> None:
        self.status = status
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            name = f"{self.created[-1].get('organization') or 'me'}/{self.created[-1]['name']}"
            return {"url": f"{self.url}/{name}", "name": name, "id": "1"}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path.endswith("/commit/main"):
            lines = [json.loads(line)["value"] for line in body.splitlines()]
            self.files |= {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
            return {"commitUrl": f"{self.url}/me/model/commit/abc", "commitOid": "abc"}
        return {"errors": [], "warnings": []}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                hub.tokens.add(self.headers["Authorization"])
                data = json.dumps(hub.answer(self.path, body) if hub.status == 200 else {"error": "no"}).encode()
                self.send_response(hub.status)
                for name, value in (("Content-Length", str(len(data))), ("Content-Type", "application/json")):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def do_GET(self) -> None:
                self.send_error(404)

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)  # HF_ENDPOINT, which is read at import
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "unet").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: other\n---\n\n# A model\n")
    (tmp_path / "unet" / "weights.safetensors").write_bytes(bytes(range(256)))
    return tmp_path


@pytest.mark.parametrize("private", [False, True])
def test_a_folder_is_uploaded_whole_with_the_token_of_huggingface_hub(hub: Hub, folder: Path, private: bool):
    assert upload(folder, "me/model", private, "after 3 iterations") == f"{hub.url}/me/model/commit/abc"
    assert hub.files == {
        "README.md": (folder / "README.md").read_bytes(),
        "unet/weights.safetensors": bytes(range(256)),
    }
    assert hub.tokens == {f"Bearer {TOKEN}"}
    (created,) = hub.created
    assert (created["name"], created["organization"]) == ("model", "me")
    assert (created.get("visibility") == "private" or created.get("private") is True) == private


def test_a_name_without_owner_goes_to_the_user(hub: Hub, folder: Path):
    upload(folder, "model", False, "message")
    assert hub.files.keys() == {"README.md", "unet/weights.safetensors"}


@pytest.mark.parametrize(
    ("status", "reason"),
    [(401, "the hub does not accept the token (401); run `hf auth login`"), (403, "the token may not write there")],
)
def test_a_refusal_is_one_line_and_the_files_stay(hub: Hub, folder: Path, status: int, reason: str):
    hub.status = status
    with pytest.raises(NotUploaded) as caught:
        upload(folder, "me/model", False, "message")
    message = str(caught.value)
    assert message.startswith("push-to-hub=me/model failed: ") and reason in message and "\n" not in message
    assert message.endswith(f"the files are in {folder}; to try again, run `hf upload me/model {folder}`")
    assert (folder / "unet" / "weights.safetensors").is_file()


def test_no_network_is_one_line(hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.stop()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(NotUploaded, match=r"^push-to-hub=me/model failed: the hub was not reached \(.*\); the files"):
        upload(folder, "me/model", False, "message")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(NotUploaded, match="the hub was not reached"):
        upload(folder, "me/model", False, "message")


@pytest.mark.parametrize("name", ["a/b/c", "with space", "-x/y", "me/model.git", "https://hub/me/model", ""])
def test_a_wrong_name_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ValueError, match="is no name of the hub.*give owner/name") as caught:
        check_repository(name)
    assert "\n" not in str(caught.value)


def test_nobody_logged_in_is_told_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.cli.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="needs a token of the hub; run `hf auth login`, or set HF_TOKEN"):
        check_repository("me/model")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--push-to-hub", "a/b/c"], "push-to-hub=a/b/c is no name of the hub"),
        (["--push-to-hub", "me/model", "--out", "OUT"], "uploads all of out=.*, which holds other files, such as keys"),
        (["--private"], "private=true is for --push-to-hub"),
    ],
)
def test_mistakes_are_found_before_the_run_is_read(
    more: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (tmp_path / "keys").write_text("secret")
    given = [str(tmp_path) if text == "OUT" else text for text in more]
    with pytest.raises(ValueError, match=message):
        export.run(build_parser().parse_args(["export", "/no/run", *given]))
