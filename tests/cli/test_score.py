"""rlcm-fast score: any pictures, scored by rewards."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rlcm_fast.cli import score
from rlcm_fast.cli.main import main
from rlcm_fast.cli.pictures import find_pictures, read_picture

BRIGHTNESS = "plugin_rewards:Brightness"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five grey pictures of two sizes, darker in the order of names, and a file that is none."""
    place = tmp_path / "pictures"
    place.mkdir()
    for number, name in enumerate(["1.png", "2.jpg", "3.webp", "10.png", "11.bmp"]):
        size = (24, 16) if number % 2 else (16, 16)
        Image.new("RGB", size, (200 - 40 * number,) * 3).save(place / name)
    (place / "notes.md").write_text("not a picture")
    return place


def prompts(tmp_path: Path, *lines: str) -> str:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def scored(folder: Path, tmp_path: Path, *more: str) -> dict:
    source = prompts(tmp_path, "a", "b", "c", "d", "e")
    out = tmp_path / "scores"
    arguments = ["--images", str(folder), "--prompts", source, "--rewards", BRIGHTNESS, "--batch-size", "2"]
    assert main(["score", *arguments, *more, "--out", str(out)]) == 0
    return json.loads((out / "scores.json").read_text())


def test_pictures_are_scored_in_the_order_of_their_names(folder: Path, tmp_path: Path):
    report = scored(folder, tmp_path)
    rows = report["pictures"]
    assert [row["file"] for row in rows] == ["1.png", "2.jpg", "3.webp", "10.png", "11.bmp"]
    assert [row["prompt"] for row in rows] == ["a", "b", "c", "d", "e"]
    expected = [10 * (200 - 40 * number) / 255 for number in range(5)]
    assert [row["scores"][BRIGHTNESS] for row in rows] == pytest.approx(expected, abs=0.05)  # JPEG and WebP round
    assert report["rewards"][BRIGHTNESS]["mean"] == pytest.approx(sum(expected) / 5, abs=0.05)
    assert report["rewards"][BRIGHTNESS]["seconds_per_picture"] > 0


def test_the_table_holds_what_the_json_holds(folder: Path, tmp_path: Path):
    report = scored(folder, tmp_path, "--rewards", BRIGHTNESS, "jpeg_compressibility")
    with (tmp_path / "scores" / "scores.csv").open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == ["file", "prompt", BRIGHTNESS, "jpeg_compressibility"]
    assert [[row[0], float(row[2])] for row in rows] == [
        [row["file"], row["scores"][BRIGHTNESS]] for row in report["pictures"]
    ]


def test_the_sheet_shows_the_best_first(folder: Path, tmp_path: Path):
    scored(folder, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "scores" / "sheet_plugin_rewards_Brightness.png"))
    middles = [sheet[6 + 96, 6 + 96 + column * (192 + 6), 0] for column in range(5)]
    np.testing.assert_allclose(middles, [200, 160, 120, 80, 40], atol=3)


def test_a_sheet_of_many_shows_both_ends(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(score, "MOST_SHOWN", 2)
    scored(folder, tmp_path)
    sheet = np.asarray(Image.open(tmp_path / "scores" / "sheet_plugin_rewards_Brightness.png"))
    assert sheet.shape[1] == 2 * (192 + 6) + 6
    np.testing.assert_allclose([sheet[102, 102, 0], sheet[102, 300, 0]], [200, 40], atol=3)


def test_a_set_reward_gives_each_picture_the_value_of_its_group(folder: Path, tmp_path: Path):
    (folder / "11.bmp").unlink()
    source = prompts(tmp_path, "a", "b")
    arguments = ["--images", str(folder), "--prompts", source, "--images-per-prompt", "2"]
    out = tmp_path / "out"
    assert main(["score", *arguments, "--rewards", "{name: diversity, group_size: 2}", "--out", str(out)]) == 0
    report = json.loads((out / "scores.json").read_text())
    values = [row["scores"]["diversity"] for row in report["pictures"]]
    assert values[0] == values[1] == pytest.approx(40 / 255, abs=0.01)
    assert values[2] == values[3]
    assert report["rewards"]["diversity"]["mean"] == pytest.approx((values[0] + values[2]) / 2)


def test_without_out_only_json_is_printed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--images", str(folder), "--prompts", prompts(tmp_path, "one for all"), "--rewards", BRIGHTNESS]
    assert main(["score", *arguments]) == 0
    assert {row["prompt"] for row in json.loads(capsys.readouterr().out)["pictures"]} == {"one for all"}


def test_a_picture_is_turned_as_its_camera_says(tmp_path: Path):
    image = Image.new("RGB", (20, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.jpg", exif=exif)
    (picture,) = find_pictures(str(tmp_path))
    assert picture.size == (20, 10)
    assert read_picture(picture).shape == (3, 20, 10)


def mistakes(folder: Path, tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    """The arguments of each mistake and the message."""
    images, texts, three = ["--images", str(folder)], prompts(tmp_path, "a"), tmp_path / "three.txt"
    three.write_text("a\nb\nc\n")
    good = [*images, "--prompts", texts, "--rewards", BRIGHTNESS]
    empty = tmp_path / "empty"
    empty.mkdir()
    return {
        "no folder": (["--images", "no", *good[2:]], "images=no is no folder; give"),
        "no picture": (["--images", str(empty), *good[2:]], "holds no picture; it needs .png"),
        "no prompts": ([*images, "--prompts", "no.txt", *good[4:]], "prompts=no.txt: there is no such file"),
        "wrong length": (
            [*images, "--prompts", str(three), *good[4:]],
            "holds 3 prompts, with images-per-prompt=1, for 5 pictures (1.png ... 11.bmp); give a line per picture",
        ),
        "no reward": ([*good[:-1], "jpeg_size"], "name=jpeg_size is not known"),
        "out is a file": ([*good, "--out", texts], "is a file; give a folder"),
        "out below a file": ([*good, "--out", f"{texts}/x/y"], "cannot be written ("),
        "groups": ([*good[:-1], "{name: diversity, group_size: 3}"], "group_size=3 does not divide the 5 images"),
        "device": ([*good, "--device", "tpu9"], "device=tpu9 cannot be used ("),
    }


MISTAKES = ["no folder", "no picture", "no prompts", "wrong length", "no reward", "out is a file", "out below a file"]


@pytest.mark.parametrize("name", [*MISTAKES, "groups", "device"])
def test_a_mistake_is_one_line_with_the_way_out(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments, message = mistakes(folder, tmp_path)[name]
    assert main(["score", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


@pytest.mark.parametrize("content", [b"no picture at all", b"\x89PNG\r\n\x1a\n broken"])
def test_a_file_that_is_no_picture_is_named_before_anything_is_built(
    content: bytes, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (folder / "5.png").write_bytes(content)
    arguments = ["--images", str(folder), "--prompts", prompts(tmp_path, "a"), "--rewards", "plugin_rewards:Nowhere"]
    assert main(["score", *arguments]) == 2
    assert "5.png cannot be read as a picture (" in capsys.readouterr().err


def test_a_picture_that_is_cut_off_is_named(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "1.png")
    whole = (folder / "1.png").read_bytes()
    (folder / "1.png").write_bytes(whole[: len(whole) // 2])
    arguments = ["--images", str(folder), "--prompts", prompts(tmp_path, "a"), "--rewards", BRIGHTNESS]
    assert main(["score", *arguments]) == 2
    assert "1.png cannot be read as a picture (image file is truncated" in capsys.readouterr().err


def test_a_reward_that_fails_is_one_line_and_exit_code_1(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    faulty = "{name: 'plugin_rewards:Faulty', arguments: {fault: exception, good_calls: 0}}"
    arguments = ["--images", str(folder), "--prompts", prompts(tmp_path, "a"), "--rewards", faulty]
    assert main(["score", *arguments]) == 1
    assert "raised OSError: the reward model is gone" in capsys.readouterr().err
