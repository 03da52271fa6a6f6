"""The reward `human`: a person ranks the images of each prompt on a web page, and ranks become scores in [-1, 1].

    ask         PNG files in run_dir/ratings, a question for each prompt
    is_answered all questions of the round are answered, and the time for an undo is over
    scores      of ranks.py; NaN for the images of a prompt that was skipped: they are left out of the round

A round that the run draws again after a restart has the images that are on the disk, and their answers count. If the
images differ (other weights, other settings), they get a folder of their own and are asked for anew.
"""

# B images of a micro-batch, N images of a round, H W pixels

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlcm_fast.faults import Fault
from rlcm_fast.finite_json import load_json
from rlcm_fast.rating.image_files import KeptImage, write_whole, written
from rlcm_fast.rating.ranks import scores_of
from rlcm_fast.rating.records import Journal
from rlcm_fast.rating.session import Plan, Question, Session
from rlcm_fast.rewards.asked import RunPlace
from rlcm_fast.rewards.extras import require
from rlcm_fast.terminal import write_line
from rlcm_fast.trajectory import Prompt

if TYPE_CHECKING:
    from rlcm_fast.rating.server import Page

RATINGS = "ratings.jsonl"  # in the folder of the run
IMAGES = "ratings"
ADDRESS = "address"  # in the folder of the images: where the page is, while the run serves it
_LEAVES_AFTER = 0.2  # seconds between two looks at the page at the end of the run
_WAITS_AT_MOST = 600.0  # seconds that the end of the run waits for the next answer


class HumanRating:
    """Scores that a person gives on a web page."""

    scope = "set"
    asks_people = True  # so nobody is asked about random images when a run starts

    def __init__(
        self, port: int = 8300, share_on_network: bool = False, undo_seconds: float = 3.0, comparisons: int = 8
    ) -> None:
        """Says where and how to ask.

        port                of the page, on 127.0.0.1; 0 takes any free port
        share_on_network    serve the page to other devices in the network, too, as to a phone
        undo_seconds        after the last answer of a round, how long it can be taken back
        comparisons         pairs of images, of the start model and of the present one, asked at each evaluation
        """
        for package in ("uvicorn", "starlette"):
            require(package, "server")
        if not 0 <= port <= 65_535:
            raise ValueError(f"port={port} must be in [0, 65535]; 0 takes any free port")
        if undo_seconds < 0 or comparisons < 0:
            raise ValueError(f"undo_seconds={undo_seconds} and comparisons={comparisons} must be 0 or more")
        self._port, self._shares = port, share_on_network
        self._undo_seconds, self._num_comparisons = undo_seconds, comparisons
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._kept: dict[int, KeptImage] = {}
        self._rounds: dict[int, _Asked] = {}  # by the number of their first image
        self._is_finished = False
        self._run: _Run | None = None

    @property
    def session(self) -> Session:
        """What is asked; there is one once the run has begun."""
        return self._of_run.session

    @property
    def urls(self) -> list[str]:
        """The addresses of the page."""
        return self._of_run.page.urls

    @property
    def _of_run(self) -> _Run:
        if self._run is None:
            raise Fault("reward human rates the rounds of a run: rlcm-fast rate --config FILE, or train.py")
        return self._run

    def readiness(self) -> str:
        """Tells where the page would be; raises ValueError if its port is taken. See AskingReward."""
        from rlcm_fast.rating import server

        with server.listen(self._port, self._shares) as listener:
            port = listener.getsockname()[1]
        where = f"http://127.0.0.1:{port}" if self._port else "http://127.0.0.1, any free port"
        return f"asks a person on {where}" + (", and in the network" if self._shares else "")

    def begin(self, place: RunPlace) -> None:
        """Opens the file and the page; see AskingReward."""
        from rlcm_fast.rating import server

        # Read what was rated before, and find the page's address.
        folder = place.run_dir
        (folder / IMAGES).mkdir(parents=True, exist_ok=True)
        session = Session(Journal(folder / RATINGS), Plan(place.num_iterations, self._undo_seconds))
        token = server.token_in(folder / IMAGES / "token")
        hosts = (*server.LOCAL, *server.names_in_network()) if self._shares else server.LOCAL

        # Serve it.
        listener = server.listen(self._port, self._shares)
        page = server.Page(server.Site(session, folder, token, hosts), listener)
        self._run = _Run(folder, session, page)
        write_whole(folder / IMAGES / ADDRESS, page.urls[-1].encode())
        write_line(f"rate here: {page.urls[0]}")
        if self._shares:
            write_line(
                "warning: share_on_network: whoever in this network knows this address sees the images and rates; the "
                f"connection is not encrypted. On this machine: {page.urls[-1]}"
            )

    def describe(self, images: Tensor, prompts: Sequence[Prompt]) -> Tensor:
        """Keeps the images as PNG and returns their numbers (B, 1) float32; see AskingReward."""
        self._of_run  # noqa: B018 (raises outside of a run, before any work)
        pixels = (images.detach().float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        kept = [KeptImage.of(one) for one in pixels]
        with self._lock:
            numbers = list(itertools.islice(self._numbers, len(kept)))
            self._kept.update(zip(numbers, kept, strict=True))
        return torch.tensor(numbers, dtype=torch.float32)[:, None]

    def value(self, described: Tensor) -> Tensor:
        """Has no answer: a person gives the value of images when they are asked, see AskingReward."""
        raise Fault("reward human has no value of images that nobody was asked about")

    def ask(self, numbers: Tensor, prompts: Sequence[Prompt], iteration: int) -> None:
        """Shows a round; see AskingReward."""
        first = int(numbers[0])
        if first in self._rounds:
            return
        # Group the images by prompt, in their order.
        kept = self._take(numbers)
        groups: dict[Prompt, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(prompt, []).append(place)

        # Write the files, unless they are there, and ask about each prompt.
        task = prompts[0].task
        name = f"{iteration:06d}" + ("" if task == "default" else f"_{_plain(task)}")
        folder = written(self._of_run.folder / IMAGES, name, kept)
        questions = []
        for number, (prompt, places) in enumerate(groups.items()):
            files = tuple(f"{IMAGES}/{folder}/{place:03d}.png" for place in places)
            height, width = kept[places[0]].pixels.shape[:2]
            id_ = f"{folder}/{number}"
            questions.append(Question(id_, iteration, "ranking", prompt.text, task, files, (width, height)))
        self._rounds[first] = _Asked(folder, list(groups.values()))
        self.session.open_round(folder, questions)

    def is_answered(self, numbers: Tensor) -> bool:
        """Tells whether the round is settled; see AskingReward."""
        return self.session.is_settled(self._rounds[int(numbers[0])].key)

    def scores(self, numbers: Tensor) -> Tensor:
        """Returns the scores of the ranks, NaN for skipped prompts; see AskingReward."""
        asked = self._rounds.pop(int(numbers[0]))
        scores = torch.full((len(numbers),), torch.nan)
        for places, rating in zip(asked.groups, self.session.take(asked.key), strict=True):
            if rating.ranks is not None:
                scores[places] = torch.tensor(scores_of(rating.ranks))
        return scores

    def compare(self, numbers: Tensor, prompts: Sequence[Prompt], iteration: int) -> None:
        """Keeps the start model's images, and asks later which are better; see AskingReward."""
        # Take some of them, of as many prompts as there are.
        kept = self._take(numbers)
        chosen = _varied(prompts)[: self._num_comparisons]
        kept, texts = [kept[place] for place in chosen], [prompts[place].text for place in chosen]
        if not kept:
            return

        # The first ones are the start model's; without them there is nothing to compare with.
        file = self._of_run.folder / IMAGES / "start.json"
        if iteration == 0:
            start = written(self._of_run.folder / IMAGES, "start", kept)
            write_whole(file, json.dumps({"folder": start, "prompts": texts}).encode())
            return
        start = _start(file, texts)
        if start is None:
            return

        # Ask which is better.
        folder = written(self._of_run.folder / IMAGES, f"{iteration:06d}_held_out", kept)
        questions = []
        for place, text in enumerate(texts):
            pair = (f"{IMAGES}/{folder}/{place:03d}.png", f"{IMAGES}/{start}/{place:03d}.png")
            height, width = kept[place].pixels.shape[:2]
            id_ = f"{folder}/{place}"
            questions.append(Question(id_, iteration, "comparison", text, prompts[0].task, pair, (width, height)))
        self.session.open_comparisons(questions)

    def metrics(self) -> dict[str, float]:
        """Returns how often the tuned model won at the last evaluation that has answers; see AskingReward."""
        rates = self.session.win_rates()
        if not rates:
            return {}
        last = rates[-1]
        return {"rating/win_rate": last.rate, "rating/compared": last.compared, "rating/of_iteration": last.round}

    def finish(self, may_stop: Callable[[], None]) -> None:
        """Waits for open comparisons while a page is open, and prints the win rate; see AskingReward."""
        self._is_finished = True
        run = self._of_run
        try:
            may_stop()
            if run.has_somebody_to_answer:
                write_line(
                    "compare the tuned images with the start model's on the page; Ctrl-C ends the run without it"
                )
            while run.has_somebody_to_answer:
                may_stop()
                time.sleep(_LEAVES_AFTER)
        finally:
            for rate in run.session.win_rates()[-1:]:
                write_line(rate.sentence)

    def close(self) -> None:
        """Ends the page."""
        if self._run is None:
            return
        run, self._run = self._run, None
        run.session.close("finished" if self._is_finished else "stopped")
        (run.folder / IMAGES / ADDRESS).unlink(missing_ok=True)
        time.sleep(_LEAVES_AFTER)  # so that an open page hears it
        run.page.close()

    def _take(self, numbers: Tensor) -> list[KeptImage]:
        with self._lock:
            return [self._kept.pop(int(number)) for number in numbers]


def wait_for_page(run_dir: Path, seconds: float = 120.0) -> str:
    """Waits until a run that is being started serves its page, and returns the address; "" if it does not."""
    file = run_dir / IMAGES / ADDRESS
    since, until = time.time(), time.monotonic() + seconds
    while time.monotonic() < until:
        if file.exists() and file.stat().st_mtime >= since - 1:  # not that of a run that was killed
            return file.read_text(encoding="utf-8")
        time.sleep(_LEAVES_AFTER)
    return ""


@dataclass(frozen=True)
class _Run:
    """What there is once the run has begun."""

    folder: Path
    session: Session
    page: Page

    @property
    def has_somebody_to_answer(self) -> bool:
        """Tells whether comparisons are open, and a page that somebody looks at."""
        is_there = self.page.site.is_visited and self.session.idle_seconds < _WAITS_AT_MOST
        return is_there and self.session.is_comparing()


@dataclass(frozen=True)
class _Asked:
    """A round that is shown."""

    key: str  # of the session
    groups: list[list[int]]  # the places of each prompt's images


def _varied(prompts: Sequence[Prompt]) -> list[int]:
    """Returns the places of all images: the first of each prompt, then the second of each, and so on."""
    seen: dict[Prompt, int] = {}
    turns = []
    for place, prompt in enumerate(prompts):
        turns.append((seen.get(prompt, 0), place))
        seen[prompt] = turns[-1][0] + 1
    return [place for _, place in sorted(turns)]


def _start(file: Path, texts: Sequence[str]) -> str | None:
    """Returns the folder of the start model's images if they show the same prompts."""
    try:
        start = load_json(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(start, dict) or "folder" not in start:
        return None
    return str(start["folder"]) if start.get("prompts") == list(texts) else None


def _plain(text: str) -> str:
    """Returns a text that is a file's name."""
    return "".join(letter if letter.isalnum() else "-" for letter in text)
