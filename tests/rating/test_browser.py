"""A person at the page, played by a headless Chromium: clicks and keys, narrow screens, restarts, a run that learns."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
from PIL import Image

pytest.importorskip("uvicorn")

from rlcm_fast.rating.records import Journal, Kind, read_ratings
from rlcm_fast.rating.reward import wait_for_page
from rlcm_fast.rating.server import Page, Site, listen
from rlcm_fast.rating.session import Plan, Question, Session

pytestmark = pytest.mark.browser

ROOT = Path(__file__).resolve().parents[2]
EVIL = "<img src=x onerror=\"document.title = 'broken into'\"> & a fox"
ENTER, SPACE, RIGHT, ESCAPE = "\ue007", "\ue00d", "\ue014", "\ue00c"  # as WebDriver names keys


class Served:
    """A page with two rounds, in a folder."""

    def __init__(self, folder: Path, undo_seconds: float = 60.0) -> None:
        (folder / "ratings/0").mkdir(parents=True, exist_ok=True)
        for place in range(4):
            Image.new("RGB", (64, 48), (60 * place, 90, 120)).save(folder / f"ratings/0/{place}.png")
        self.session = Session(Journal(folder / "ratings.jsonl"), Plan(60, undo_seconds))
        self.session.open_round("0", [self.question("0/0", EVIL), self.question("0/1", "an owl")])
        self.page = Page(Site(self.session, folder, "t" * 43), listen(0, shares=False))

    def question(self, id_: str, prompt: str, kind: Kind = "ranking") -> Question:
        images = tuple(f"ratings/0/{place}.png" for place in range(2 if kind == "comparison" else 4))
        return Question(id_, int(id_[0]), kind, prompt, "default", images, (64, 48))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    found = Served(tmp_path)
    yield found
    found.page.close()


def open_page(browser: Any, url: str, width: int = 1280) -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get_log("browser")  # forgets what earlier pages said
    browser.get(url)
    wait(lambda: len(labels(browser)) > 0)


def wait(is_so: Callable[[], bool], seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.05)


def press(browser: Any, *keys: str) -> None:
    """Types keys one by one, wherever the focus is, as a keyboard does: under an open dialog the page takes none."""
    from selenium.webdriver import ActionChains

    for key in keys:
        ActionChains(browser).send_keys(key).perform()


def labels(browser: Any) -> list[str]:
    """What a screen reader says of the images."""
    script = "return [...document.querySelectorAll('#rating:not([hidden]) .pick')].map(p => p.ariaLabel)"
    return browser.execute_script(script)


def text(browser: Any, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0]).innerText", selector)


def test_digits_rank_enter_sends_and_u_takes_back(browser: Any, served: Served, tmp_path: Path):
    open_page(browser, served.page.urls[0])
    assert text(browser, "#prompt") == EVIL
    press(browser, "3", "1", "t", "2")
    assert [label.partition(", ")[2] for label in labels(browser)] == [
        "tied for place 2",
        "tied for place 2",
        "place 1",
        "not picked",
    ]
    press(browser, "u", "u", "1", ENTER)
    wait(lambda: text(browser, "#prompt") == "an owl")
    press(browser, "u")
    wait(lambda: text(browser, "#prompt") == EVIL)
    press(browser, "4", RIGHT, ENTER)
    wait(lambda: text(browser, "#prompt") == "an owl")
    press(browser, "s")
    wait(lambda: "learns" in text(browser, "#waiting-title"))
    assert [rating.ranks for rating in read_ratings(tmp_path / "ratings.jsonl")] == [(2, 2, 2, 1), None]
    assert browser.title == "Rate: rlcm_fast"
    assert browser.get_log("browser") == []


def test_arrows_and_space_do_what_digits_do(browser: Any, served: Served, tmp_path: Path):
    open_page(browser, served.page.urls[0])
    press(browser, RIGHT, SPACE, RIGHT, SPACE)
    assert [label[-7:] for label in labels(browser)] == [" picked", "place 1", "place 2", " picked"]
    press(browser, ENTER)
    wait(lambda: text(browser, "#prompt") == "an owl")
    press(browser, "t", ENTER)  # all tie
    wait(lambda: len(read_ratings(tmp_path / "ratings.jsonl")) == 2)
    assert [rating.ranks for rating in read_ratings(tmp_path / "ratings.jsonl")] == [(3, 1, 2, 3), (1, 1, 1, 1)]


@pytest.mark.parametrize("width", [1280, 360])
def test_a_mouse_or_a_finger_is_enough_and_nothing_scrolls_sideways(browser: Any, served: Served, width: int):
    open_page(browser, served.page.urls[0], width)
    click = "document.querySelectorAll(arguments[0])[arguments[1]].click()"
    browser.execute_script(click, ".pick", 2)
    browser.execute_script(click, "#send", 0)
    wait(lambda: text(browser, "#prompt") == "an owl")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    small = "return [...document.querySelectorAll('main button:not([hidden])')].filter(b => b.offsetHeight > 0)"
    assert browser.execute_script(f"{small}.every(b => b.offsetHeight >= 40 && b.offsetWidth >= 40)"), "for a thumb"
    drawn = "return [...document.querySelectorAll('.pick img')].every(i => i.complete && i.naturalWidth === 64)"
    wait(lambda: browser.execute_script(drawn))


def test_a_comparison_is_one_key_and_the_chart_shows_what_was_learned(browser: Any, served: Served):
    served.session.open_comparisons([served.question(f"1/{n}", "a cat", "comparison") for n in range(3)])
    open_page(browser, served.page.urls[0])
    for number in (1, 2, 3):
        wait(lambda number=number: f"{number} of 3" in text(browser, "#task"))
        press(browser, "1" if number < 3 else "t")
    wait(lambda: text(browser, "#prompt") == EVIL)
    assert "of 3 pairs" in text(browser, "#learned-text")


def test_help_pause_and_zoom_open_and_close_by_keys(browser: Any, served: Served):
    open_page(browser, served.page.urls[0])
    is_open = "return document.querySelector(arguments[0]).open"
    for key, selector in (("?", "#help-dialog"), ("z", "#zoom-dialog")):
        press(browser, key)
        wait(lambda selector=selector: browser.execute_script(is_open, selector))
        press(browser, ESCAPE)
        wait(lambda selector=selector: not browser.execute_script(is_open, selector))
    press(browser, "p")
    wait(lambda: text(browser, "#waiting-title") == "A break")
    press(browser, "p")
    wait(lambda: len(labels(browser)) == 4)


def test_a_page_that_stays_open_goes_on_after_a_restart(browser: Any, tmp_path: Path):
    first = Served(tmp_path)
    port = int(first.page.urls[0].split(":")[2].split("/")[0])
    open_page(browser, first.page.urls[0])
    press(browser, "1", ENTER)
    wait(lambda: text(browser, "#prompt") == "an owl")
    first.page.close()
    wait(lambda: "cannot be reached" in text(browser, "#waiting-title"), 40)
    second = Served(tmp_path)
    again = Page(Site(second.session, tmp_path, "t" * 43), listen(port, shares=False))
    wait(lambda: len(labels(browser)) == 4, 40)
    assert text(browser, "#prompt") == "an owl"
    again.close()
    second.page.close()


def test_a_run_is_rated_stopped_in_the_middle_of_a_round_and_rated_to_its_end(
    browser: Any, tiny_lcm_folder: str, tmp_path: Path
):
    run_dir = tmp_path / "run"
    settings = {
        "rewards": [{"name": "human", "arguments": {"undo_seconds": 0}}],
        "advantages.kind": "group",
        "update.num_updates": 1,
        "update.rollout_lag": 1,
        "update.micro_batch_size": 4,
        "checkpoint.every": 1,
        "num_iterations": 3,
    }
    options = tiny_runs.arguments(tiny_lcm_folder, run_dir, settings)
    empty = tmp_path / "empty.yaml"
    empty.write_text("{}\n")
    command = [sys.executable, "-m", "rlcm_fast.cli.main", "rate", "--config", str(empty), "--port", "0", *options]

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "log").open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)

    # Rate the first round and half of the second, and stop by the button.
    process = start()
    open_page(browser, wait_for_page(run_dir))
    for count in range(1, 4):
        press(browser, "2", ENTER)
        place = f"Round {1 + count // 2} of 3", f"Prompt {1 + count % 2} of 2"
        wait(lambda place=place: is_at(browser, *place), 60)
    prompt = text(browser, "#prompt")
    wait(lambda: (run_dir / "checkpoints/iteration_000001").is_dir(), 60)
    browser.execute_script("document.querySelector('#stop').click(); document.querySelector('#stop-now').click()")
    assert process.wait(60) == 0

    # Start again: the same images of the round's other prompt are asked, and the run comes to its end.
    shown = read_ratings(run_dir / "ratings.jsonl")
    process = start()
    open_page(browser, wait_for_page(run_dir))
    assert text(browser, "#prompt") == prompt
    while process.poll() is None and not (run_dir / "export").is_dir():
        if len(labels(browser)) == 2:
            press(browser, "1", ENTER)
        time.sleep(0.2)
    assert process.wait(60) == 0, (tmp_path / "log").read_text()[-2000:]
    ratings = read_ratings(run_dir / "ratings.jsonl")
    assert ratings[:3] == shown
    assert [rating.round for rating in ratings] == [0, 0, 1, 1, 2, 2]
    assert [line["iteration"] for line in tiny_runs.metrics(run_dir)][:3] == [0, 1, 2]


def is_at(browser: Any, round_: str, prompt: str) -> bool:
    """Tells whether the page shows this prompt of this round."""
    return text(browser, "#progress-text").startswith(round_) and text(browser, "#task").startswith(prompt)
