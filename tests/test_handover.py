"""What a Python program hands over, as the config has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlcm_fast.handover import Handover
from rlcm_fast.rewards.jpeg import JpegCompressibility
from rlcm_fast.trajectory import Prompt


class Local:
    """A reward by the protocol."""

    scope = "image"

    def __call__(self, images, prompts):
        return images.mean(dim=(1, 2, 3))


class Spread:
    """A set reward by the protocol."""

    scope = "set"

    def describe(self, images, prompts):
        return images.flatten(1)[:, :2]

    def value(self, described):
        return described.std(dim=1).mean(dim=1)


def blueness(images, texts):
    return images[:, 2].mean(dim=(1, 2))


def test_rewards_are_names_with_weights_and_classes_stay_importable(tmp_path: Path):
    handover = Handover(tmp_path)
    items = ["diversity", ("jpeg_compressibility", 2.0), JpegCompressibility, {"name": "geneval", "weight": 0.5}]
    assert handover.entries(items, "rewards") == [
        {"name": "diversity"},
        {"name": "jpeg_compressibility", "weight": 2.0},
        {"name": "rlcm_fast.rewards.jpeg:JpegCompressibility"},
        {"name": "geneval", "weight": 0.5},
    ]
    assert handover.rewards == {}


def test_objects_are_kept_under_names_that_tell_where_they_came_from(tmp_path: Path):
    handover, local, spread = Handover(tmp_path), Local(), Spread()
    entries = handover.entries([(blueness, 3.0), local, {"name": spread, "group_size": 4}], "rewards")
    assert [entry["name"] for entry in entries] == ["python:blueness", "python:Local", "python:Spread"]
    assert (entries[0]["weight"], entries[2]["group_size"]) == (3.0, 4)
    assert len(entries[0]["arguments"]["code"]) == 12
    assert (handover.rewards["python:Local"], handover.rewards["python:Spread"]) == (local, spread)


def test_prompts_become_a_file_of_their_contents(tmp_path: Path):
    handover = Handover(tmp_path)
    texts = handover.source(["a cat", "a dog"], "prompts")
    assert handover.source(lambda: ["a cat", "a dog"], "prompts") == texts
    assert handover.source(Path("animals.txt"), "prompts") == "animals.txt"
    labelled = handover.source([Prompt("two cats", "pets", json.dumps({"objects": ["a cat"]}))], "prompts")
    assert not list(tmp_path.iterdir())
    handover.write()
    assert Path(texts).read_text() == '{"text": "a cat"}\n{"text": "a dog"}\n'
    assert json.loads(Path(labelled).read_text()) == {"text": "two cats", "task": "pets", "objects": ["a cat"]}


def test_a_refused_start_takes_back_what_it_wrote_and_no_more(tmp_path: Path):
    earlier = Handover(tmp_path)
    earlier.source(["a cat"], "prompts")
    earlier.write()
    handover = Handover(tmp_path)
    handover.source(["a cat"], "prompts")
    handover.source(["a dog"], "prompts")

    def start() -> None:
        with handover.taken_back_if_refused():
            handover.write()
            raise ValueError("refused")

    with pytest.raises(ValueError, match="refused"):
        start()
    assert len(list(tmp_path.iterdir())) == 1
