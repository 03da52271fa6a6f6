"""The reward `human`: images go onto the page, ranks come back as scores, and a restart asks nothing twice."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("uvicorn")

from rlcm_fast.faults import Fault
from rlcm_fast.rating import reward as rating_reward
from rlcm_fast.rating.image_files import KeptImage, is_same
from rlcm_fast.rating.reward import HumanRating
from rlcm_fast.rating.win_rate import WinRate
from rlcm_fast.rewards import PersonReward, RewardService, RunPlace, Workers, grouped, make_reward
from rlcm_fast.trajectory import Prompt

FOX, OWL = Prompt("a fox"), Prompt("an owl")


class Asked:
    """A reward that has begun in a folder."""

    def __init__(self, folder: Path, num_iterations: int = 60) -> None:
        self.reward = HumanRating(port=0, undo_seconds=0)
        self.reward.begin(RunPlace(folder, num_iterations))

    def open(self, images: Tensor, prompts: list[Prompt], iteration: int = 0) -> Tensor:
        """Describes images in two micro-batches and asks; returns their numbers."""
        half = len(images) // 2
        parts = [self.reward.describe(part, prompts[:half]) for part in (images[:half], images[half:])]
        numbers = torch.cat(parts)[:, 0]
        self.reward.ask(numbers, prompts, iteration)
        return numbers

    def answer(self, tiers: list[list[int]]) -> None:
        self.reward.session.answer(self.reward.session.view()["question"]["id"], tiers)


@pytest.fixture
def asked(tmp_path: Path) -> Iterator[Asked]:
    found = Asked(tmp_path)
    yield found
    found.reward.close()


def images(seed: int = 0, count: int = 6) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


PROMPTS = [FOX] * 3 + [OWL] * 3


def test_ranks_become_scores_in_the_order_of_the_images_and_a_skipped_prompt_has_none(asked: Asked):
    numbers = asked.open(images(), PROMPTS)
    assert not asked.reward.is_answered(numbers)
    asked.answer([[2], [0]])
    asked.reward.session.skip(asked.reward.session.view()["question"]["id"])
    assert asked.reward.is_answered(numbers)
    scores = asked.reward.scores(numbers)
    assert scores[:3].tolist() == [0, -1, 1]
    assert scores[3:].isnan().all()


def test_images_lie_beside_the_file_as_they_were_drawn(asked: Asked, tmp_path: Path):
    from PIL import Image

    drawn = images()
    asked.open(drawn, PROMPTS, iteration=7)
    asked.answer([[0]])
    line = json.loads((tmp_path / "ratings.jsonl").read_text())
    assert line["prompt"] == "a fox"
    assert line["round"] == 7
    for file, image in zip(line["images"], drawn[:3], strict=True):
        there = torch.frombuffer(bytearray(Image.open(tmp_path / file).tobytes()), dtype=torch.uint8)
        assert torch.equal(there.reshape(16, 16, 3).permute(2, 0, 1), (image * 255).round().to(torch.uint8))


def test_a_tasks_round_is_numbered_by_its_iteration_and_lies_in_a_folder_of_its_own(asked: Asked, tmp_path: Path):
    for task in ("colour", "size"):
        asked.open(images(), [Prompt(prompt.text, task) for prompt in PROMPTS], iteration=7)
    assert asked.reward.session.view()["round"] == 8
    for _ in range(4):
        asked.answer([[0]])
    lines = [json.loads(line) for line in (tmp_path / "ratings.jsonl").read_text().splitlines()]
    folders = {f"ratings/000007_{line['task']}" for line in lines}
    assert [line["round"] for line in lines] == [7] * 4
    assert folders == {str(Path(line["images"][0]).parent) for line in lines} and len(folders) == 2


def test_a_restart_asks_only_for_what_is_not_answered(tmp_path: Path):
    first = Asked(tmp_path)
    first.open(images(), PROMPTS)
    first.answer([[1]])
    url = first.reward.urls[0]
    first.reward.close()
    second = Asked(tmp_path)
    numbers = second.open(images() + 0.001, PROMPTS)  # what another GPU rounds
    assert second.reward.session.view()["question"]["prompt"] == "an owl"
    second.answer([[0]])
    assert second.reward.scores(numbers).tolist() == [-0.5, 1, -0.5, 1, -0.5, -0.5]
    assert second.reward.urls[0].split("/")[3] == url.split("/")[3], "an open page goes on"
    second.reward.close()


def test_other_images_of_the_same_round_are_asked_for_and_overwrite_nothing(tmp_path: Path):
    first = Asked(tmp_path)
    first.open(images(), PROMPTS)
    first.answer([[1]])
    first.reward.close()
    before = {file: file.read_bytes() for file in tmp_path.glob("ratings/000000/*.png")}
    second = Asked(tmp_path)
    second.open(images(seed=1), PROMPTS)
    assert second.reward.session.view()["question"]["prompt"] == "a fox"
    assert all(file.read_bytes() == content for file, content in before.items())
    assert len(list(tmp_path.glob("ratings/000000_2/*.png"))) == 6
    second.reward.close()


def test_an_evaluation_keeps_the_start_models_images_and_later_asks_for_the_better_ones(tmp_path: Path):
    found = Asked(tmp_path)
    for iteration, seed in ((0, 0), (10, 1)):
        numbers = found.reward.describe(images(seed, 20), [FOX] * 20)[:, 0]
        found.reward.compare(numbers, [FOX] * 20, iteration)
    session = found.reward.session
    assert session.view()["question"]["count"] == 8
    shown = session.view()["question"]
    tuned = next(place for place, file in enumerate(shown["images"]) if "held_out" in file)
    session.answer(shown["id"], [[tuned]])
    assert session.win_rates() == [WinRate(10, wins=1, ties=0, losses=0)]
    found.reward.close()


def test_comparisons_show_as_many_prompts_as_there_are():
    prompts = [Prompt(text) for text in "abcd" * 4 + "eeee"]
    assert [prompts[place].text for place in rating_reward._varied(prompts)] == list("abcdeabcdeabcdeabcde")


def test_an_evaluation_on_other_prompts_has_nothing_to_compare_with(tmp_path: Path):
    found = Asked(tmp_path)
    for iteration, prompt in ((0, FOX), (10, OWL)):
        numbers = found.reward.describe(images(iteration, 4), [prompt] * 4)[:, 0]
        found.reward.compare(numbers, [prompt] * 4, iteration)
    assert found.reward.session.view()["question"] is None
    found.reward.close()


def test_the_metrics_have_the_win_rate_of_the_last_evaluation_with_answers(tmp_path: Path):
    found = Asked(tmp_path)
    for iteration in (0, 10, 20):
        numbers = found.reward.describe(images(iteration, 4), [FOX] * 4)[:, 0]
        found.reward.compare(numbers, [FOX] * 4, iteration)
        assert found.reward.metrics().get("rating/of_iteration") == (10 if iteration == 20 else None)
        if iteration == 10:
            for tiers in ([[0], [1]], [[0, 1]], [[0, 1]]):
                found.answer(tiers)
    won = found.reward.session.win_rates()[0].wins  # the page hides which image is which
    metrics = {"rating/win_rate": (won + 1) / 3, "rating/compared": 3, "rating/of_iteration": 10}
    assert found.reward.metrics() == metrics
    found.reward.close()


def test_a_full_disk_is_one_line(asked: Asked, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(Fault, match=r"000.png cannot be written \(No space left on device\): free some space"):
            asked.open(images(), PROMPTS)


def test_half_an_image_of_a_killed_run_is_written_again(asked: Asked, tmp_path: Path):
    (tmp_path / "ratings/000000").mkdir()
    (tmp_path / "ratings/000000/001.png").write_bytes(b"\x89PNG\r\n")
    asked.open(images(), PROMPTS)
    assert not (tmp_path / "ratings/000000_2").exists()
    assert is_same(tmp_path / "ratings/000000/001.png", KeptImage(*pixels(images()[1])))


def pixels(image: Tensor) -> tuple:
    array = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return array, b""


def test_outside_of_a_run_it_says_where_it_belongs():
    with pytest.raises(Fault, match="rlcm-fast rate"):
        HumanRating().describe(images(), PROMPTS)


@pytest.mark.parametrize("arguments", [{"port": 70_000}, {"undo_seconds": -1.0}, {"comparisons": -1}])
def test_wrong_arguments_are_named(arguments: dict):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        make_reward("human", arguments)


def test_a_group_size_has_no_use():
    for settings in ((4, "group"), (0, "leave_one_out")):
        with pytest.raises(ValueError, match="has no use: a person ranks"):
            grouped("human", HumanRating(), *settings)


def test_the_service_waits_for_the_person_and_may_be_stopped(tmp_path: Path):
    reward = HumanRating(port=0, undo_seconds=0)
    reward.begin(RunPlace(tmp_path, 60))
    workers = Workers(2, timeout=0.5)  # a person is never overdue
    service = RewardService({"human": (PersonReward("human", reward), 2.0)}, workers)

    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    for iteration in range(2):  # micro-batches end inside of a prompt
        service.submit(images()[:4], PROMPTS[:4])
        service.submit(images()[4:], PROMPTS[4:])
        if iteration == 0:
            with pytest.raises(Stop):
                service.gather(0, stop)
    ends = threading.Event()
    threading.Timer(0.6, lambda: threading.Thread(target=rate_all, args=(reward, ends), daemon=True).start()).start()
    found = service.gather(1)
    ends.set()
    assert found.by_name["human"].tolist() == [1, -0.5, -0.5, 1, -0.5, -0.5]
    assert found.total.tolist() == [2, -1, -1, 2, -1, -1]
    reward.close()
    workers.shutdown()


def rate_all(reward: HumanRating, ends: threading.Event) -> None:
    """Prefers the first image of whatever is asked."""
    while not ends.wait(0.01):
        question = reward.session.view()["question"]
        if question is not None:
            reward.session.answer(question["id"], [[0]])
