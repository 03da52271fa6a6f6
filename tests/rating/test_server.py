"""The page: who may see it, what it answers, and that it does so while it waits for a change."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")

from rlcm_fast.rating.records import Journal
from rlcm_fast.rating.server import Page, Site, listen, token_in
from rlcm_fast.rating.session import Plan, Question, Session

TOKEN = "t" * 43


class Client:
    """Asks the page for something over the loopback interface."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.port = int(page.urls[0].split(":")[2].split("/")[0])

    def __call__(
        self, path: str, posted: Any = None, token: str = TOKEN, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if posted is None:
            connection.request("GET", f"/{token}/{path}", headers=sent)
        else:
            body = posted if isinstance(posted, bytes) else json.dumps(posted).encode()
            connection.request("POST", f"/{token}/{path}", body, {"Content-Type": "application/json", **sent})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, content

    def state(self, after: str = "") -> dict[str, Any]:
        return json.loads(self(f"state?after={after}")[2])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[Client]:
    session = Session(Journal(folder / "ratings.jsonl"), Plan(60, undo_seconds=0))
    images = tuple(f"ratings/000000/{place:03d}.png" for place in range(3))
    (folder / "ratings/000000").mkdir(parents=True)
    (folder / images[0]).write_bytes(b"a picture")
    (folder / "ratings/token").write_text("secret")
    questions = [Question(f"000000/{n}", 0, "ranking", "a fox", "default", images, (64, 64)) for n in range(3)]
    session.open_round("000000", questions)
    page = Page(Site(session, folder, TOKEN), listen(0, shares=False))
    yield Client(page)
    page.close()


def test_the_page_and_its_parts_are_there(client: Client):
    for path, kind in (("", "text/html"), ("page.css", "text/css"), ("page.js", "text/javascript")):
        status, headers, content = client(path)
        assert status == 200
        assert headers["content-type"].startswith(kind)
        assert len(content) > 1000


def test_the_page_loads_nothing_from_elsewhere(client: Client):
    for path in ("", "page.css", "page.js"):
        text = client(path)[2].decode()
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
        assert "style=" not in text.replace("elements.style", "")
    headers = client("state")[1]
    assert headers["cache-control"] == "no-store"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("token", ["", "x", TOKEN[:-1], TOKEN + "t", "T" + TOKEN[1:], "%00", "caf%C3%A9"])
def test_nobody_without_the_token_sees_anything(client: Client, token: str):
    for path in ("", "state", "images/ratings/000000/000.png"):
        status, _, content = client(path, token=token)
        assert status == 404
        assert b"fox" not in content


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost.evil.example:1"]
)
def test_a_name_of_the_web_does_not_reach_the_page(client: Client, host: str):
    assert client("state", Host=host)[0] in (400, 421)


@pytest.mark.parametrize("host", ["localhost:9000", "127.0.0.1:1", "LOCALHOST", "[::1]:80"])
def test_a_tunnel_may_end_at_another_port(client: Client, host: str):
    assert client("state", Host=host)[0] == 200


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://127.0.0.1", "http://127.0.0.1:1"])
def test_a_post_of_another_page_is_refused(client: Client, origin: str):
    assert client("undo", {}, Origin=origin)[0] == 403


def test_a_post_of_the_page_itself_is_taken(client: Client):
    assert client("undo", {}, Origin=f"http://127.0.0.1:{client.port}")[0] == 409, "there is nothing to undo"


@pytest.mark.parametrize(
    ("posted", "headers", "problem"),
    [
        (b"no json", {}, "Expecting value"),
        (b"[]", {}, "must be a JSON object"),
        (b"{}", {"Content_Type": "text/plain"}, "application/json"),
        (b" " * 70_000, {}, "larger than 65536"),
        ({"id": "000000/0", "tiers": 3}, {}, "list of lists"),
        ({"id": "000000/0", "tiers": [[3]]}, {}, "each of 3 images"),
        ({"id": "000000/0", "tiers": [["0"]]}, {}, "each of 3 images"),
        ({"id": "000000/0", "tiers": [[[0]]]}, {}, "tiers"),
    ],
)
def test_what_is_no_answer_is_refused_in_a_line(client: Client, posted: Any, headers: dict, problem: str):
    status, _, content = client("answer", posted, **headers)
    assert status == 400
    assert problem in json.loads(content)["error"]


def test_only_images_of_questions_are_served(client: Client):
    assert client("images/ratings/000000/000.png")[2] == b"a picture"
    for path in ("ratings/token", "ratings/000000/../token", "../ratings.jsonl", "ratings.jsonl", "%2e%2e/token"):
        assert client(f"images/{path}")[0] == 404


def test_an_answer_is_recorded_and_a_waiting_page_hears_of_it(client: Client, folder: Path):
    before = client.state()
    heard: list[dict[str, Any]] = []
    waiting = threading.Thread(target=lambda: heard.append(client.state(str(before["version"]))))
    waiting.start()
    time.sleep(0.2)
    assert not heard, "it waits for a change"
    assert client("answer", {"id": "000000/0", "tiers": [[2], [0, 1]]})[0] == 200
    waiting.join(5)
    assert heard[0]["question"]["id"] == "000000/1"
    line = json.loads((folder / "ratings.jsonl").read_text().splitlines()[-1])
    assert (line["id"], line["ranks"], line["prompt"]) == ("000000/0", [2, 2, 1], "a fox")
    assert client("undo", {})[0] == 200
    assert client.state()["question"]["id"] == "000000/0"


def test_a_full_disk_is_said_and_the_same_answer_may_come_again(client: Client, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_append", full)
        status, _, content = client("answer", {"id": "000000/0", "tiers": [[0]]})
        assert status == 507
        assert "No space left" in json.loads(content)["error"]
    assert client("answer", {"id": "000000/0", "tiers": [[0]]})[0] == 200


def test_a_token_lasts_over_restarts_and_is_secret(tmp_path: Path):
    file = tmp_path / "token"
    token = token_in(file)
    assert len(token) >= 43
    assert token_in(file) == token
    assert file.stat().st_mode & 0o077 == 0
    file.write_text("short")
    assert token_in(file) != "short"


def test_a_port_that_is_taken_is_named():
    with listen(0, shares=False) as taken, pytest.raises(ValueError, match=r"port=\d+ .* give another"):
        listen(taken.getsockname()[1], shares=False)


def test_the_page_is_not_in_the_network_unless_asked(client: Client):
    assert client.page.urls == [f"http://127.0.0.1:{client.port}/{TOKEN}/"]
