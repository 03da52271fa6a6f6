"""Data that cannot be read: one line of ours, where it can be before weights load, with the line or shard at fault."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import tarfile
from pathlib import Path

import datasets
import pytest
from PIL import Image

from rlcm_fast.door import is_worded_by_us
from rlcm_fast.pairs import PairsFault, PairStream, check_rows, check_source
from rlcm_fast.pairs.stream import Count

NUM_PAIRS = 8


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with 0.png to 7.png."""
    monkeypatch.chdir(tmp_path)
    for i in range(NUM_PAIRS):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    return tmp_path


def write_lines(file: Path, key: str, extra: str = "") -> None:
    """A pair a line, then `extra`."""
    lines = [json.dumps({key: f"{i}.png", "text": "grey"}) for i in range(NUM_PAIRS)]
    file.write_text("\n".join([*lines, extra]))


def write_shard(file: Path, first: int = 0) -> None:
    with tarfile.open(file, "w") as tar:
        for i in range(NUM_PAIRS):
            for ending, content in (("png", Path(f"{i}.png").read_bytes()), ("txt", b"grey")):
                member = tarfile.TarInfo(f"{first + i:02}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def write_parquet(folder: Path) -> None:
    table = {"picture": [{"bytes": Path("0.png").read_bytes(), "path": None}], "caption": ["grey"]}
    features = datasets.Features({"picture": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict(table, features=features).to_parquet(folder / "train.parquet")


def check(data: str) -> None:
    check_source(data)
    check_rows(data)


def is_refused(data: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        check(data)
    assert_one_line(raised.value, data)


def is_refused_when_read(data: str, message: str) -> None:
    """After checks that find nothing."""
    check(data)
    stream = PairStream(data, 8, 4, seed=0)
    with pytest.raises(PairsFault, match=message) as raised:
        all(stream.next_batch() for _ in range(NUM_PAIRS))
    assert_one_line(raised.value, data)


def assert_one_line(error: BaseException, data: str) -> None:
    assert is_worded_by_us(error)
    assert str(error).startswith(f"pretraining.data={data}")
    assert "\n" not in str(error)


@pytest.mark.parametrize("line", ["{not json", "[1, 2]", '{"image": "0.png"}'])
def test_a_line_that_is_no_pair_is_named(folder: Path, line: str):
    write_lines(folder / "pairs.jsonl", "image", line)
    is_refused("pairs.jsonl", r': line 9 of pairs.jsonl is .*; write \{"image": "a/1.jpg", "text": "a cat"\}$')


def test_a_line_that_is_no_text_is_named(folder: Path):
    (folder / "pairs.jsonl").write_bytes(b'\n{"image": "0.png", "text": "caf\xe9"}')
    is_refused("pairs.jsonl", r": line 2 of pairs.jsonl is .*caf.*xe9")


@pytest.mark.parametrize("data", ["pairs.jsonl", "."])
@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_a_line_is_empty(folder: Path, data: str, content: str):
    file = "metadata.jsonl" if data == "." else data
    (folder / file).write_text(content)
    is_refused(data, f": {file} is empty; ")


def test_a_bad_line_far_from_the_first_is_found_when_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rlcm_fast.pairs.checks._NUM_CHECKED", 8)
    write_lines(folder / "pairs.jsonl", "image", "{not json")
    is_refused_when_read("pairs.jsonl", r": line 9 of pairs.jsonl is '\{not json'; write ")


def test_metadata_are_checked_line_by_line(folder: Path):
    write_lines(folder / "metadata.jsonl", "file_name", '{"file_name": "0.png", "caption": "grey"}')
    is_refused(".", r": line 9 of metadata.jsonl is .*; give each image its file_name and text, as ")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_an_image_that_metadata_name_is_there(folder: Path, name: str):
    write_lines(folder / name, "file_name", '{"file_name": "gone.png", "text": "grey"}')
    if name == "metadata.csv":
        (folder / name).write_text("file_name,text\n0.png,grey\ngone.png,grey\n")
    is_refused(".", r": its image .*gone.png is not there; paths are relative to the metadata$")


def test_an_image_that_a_jsonl_file_names_is_there(folder: Path):
    write_lines(folder / "pairs.jsonl", "image", '{"image": "gone.png", "text": "grey"}')
    is_refused("pairs.jsonl", r": its image gone.png is not there; paths are relative to the file$")


def test_metadata_without_columns_are_refused(folder: Path):
    (folder / "metadata.csv").touch()
    is_refused(".", r": cannot be read \(EmptyDataError: .*\); give each image its file_name and text")


@pytest.mark.parametrize("size", [0, 100, 2000])
def test_a_shard_that_breaks_off_is_named(folder: Path, size: int):
    write_shard(folder / "0.tar")
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:size])
    is_refused("*.tar", r": 0.tar cannot be read \(ReadError: .*\); make the shard again, or take it out$")


def test_a_later_shard_that_breaks_off_is_named_when_it_is_read(folder: Path):
    for shard in range(3):
        write_shard(folder / f"{shard}.tar", shard * NUM_PAIRS)
    (folder / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:6000])
    is_refused_when_read("{0..2}.tar", r": 1.tar cannot be read \(ReadError: .*\); make the shard again")


@pytest.mark.parametrize(
    "query, message",
    [
        ("", "has no image with a caption in image, text of a row with picture, caption; name the columns, as "),
        ("?image=picture&text=caption&split=test", ": cannot be read .*test.*; check its name, what follows . and"),
        ("?image=picture&text=caption&name=other", ": cannot be read .*other.*; check its name, what follows . and"),
    ],
)
def test_what_a_dataset_does_not_have_is_refused(folder: Path, query: str, message: str):
    (folder / "data").mkdir()
    write_parquet(folder / "data")
    check_rows("hf:./data?image=picture&text=caption")
    is_refused(f"hf:./data{query}", message)


def test_a_hub_out_of_reach_is_one_line_and_no_matter_to_a_dry_run(monkeypatch: pytest.MonkeyPatch):
    def load_dataset(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\n(no network)")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    is_refused("hf:owner/name", r": cannot be read \(ConnectionError: Couldn't reach .* Hub \(no network\)\); check ")
    check_source("hf:owner/name")


def test_a_caption_that_is_no_text_is_skipped_and_named(folder: Path):
    for i in range(NUM_PAIRS):
        (folder / f"{i}.txt").write_bytes(b"caf\xe9" if i == 3 else b"grey")
    check(".")
    stream = PairStream(".", 8, NUM_PAIRS, seed=0)
    assert len(stream.next_batch()[1]) == NUM_PAIRS - 1
    assert re.fullmatch(
        r"pretraining.data=\.: 3.txt cannot be read \('utf-8' .*\); save it as UTF-8", stream.count.problem
    )


def test_what_lies_beside_images_is_no_image(folder: Path):
    """Files of macOS and Windows, and what would make a reader wait for ever."""
    for i in range(NUM_PAIRS):
        (folder / f"{i}.txt").write_text("grey")
    (folder / "__MACOSX").mkdir()
    (folder / ".cache").mkdir()
    for junk in ("._0.png", "._0.txt", "Thumbs.db", ".DS_Store", "__MACOSX/0.png", ".cache/0.png"):
        (folder / junk).write_bytes(b"junk")
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        check(".")
        stream = PairStream(".", 8, NUM_PAIRS, seed=0)
        assert len(stream.next_batch()[1]) == NUM_PAIRS
        assert stream.count == Count(NUM_PAIRS)


@pytest.mark.parametrize("data", [".", "pairs.jsonl"])
def test_a_pipe_that_metadata_name_is_skipped_and_does_not_hang(
    folder: Path, data: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("rlcm_fast.pairs.checks._NUM_CHECKED", 4)  # beyond these, nobody has looked
    write_lines(folder / "pairs.jsonl", "image")
    write_lines(folder / "metadata.jsonl", "file_name")
    (folder / "7.png").unlink()
    os.mkfifo(folder / "7.png")
    check(data)
    stream = PairStream(data, 8, NUM_PAIRS, seed=0)
    assert len(stream.next_batch()[1]) == NUM_PAIRS - 1
    assert re.search(r"7.png cannot be read \(OSError: it is no regular file\); take it out", stream.count.problem)


def test_a_pipe_is_no_shard(folder: Path):
    os.mkfifo(folder / "0.tar")
    is_refused("*.tar", "matches no .tar file")


@pytest.mark.parametrize("has_one_file", [True, False])
@pytest.mark.parametrize("names", [("train", "test"), ("holiday_train", "2020-test")])
def test_folders_named_as_splits_are_one_source(folder: Path, names: tuple[str, str], has_one_file: bool):
    lines: dict[str, list[str]] = {name: [] for name in names}
    for i in range(NUM_PAIRS):
        name = names[i % 2]
        (folder / name).mkdir(exist_ok=True)
        (folder / f"{i}.png").rename(folder / name / f"{i}.png")
        file = f"{name}/{i}.png" if has_one_file else f"{i}.png"
        lines[name].append(json.dumps({"file_name": file, "text": f"grey {i}"}))
    if has_one_file:
        (folder / "metadata.jsonl").write_text("\n".join([*lines[names[0]], *lines[names[1]]]))
    else:
        for name in names:
            (folder / name / "metadata.jsonl").write_text("\n".join(lines[name]))
    check(".")
    texts = PairStream(".", 8, NUM_PAIRS, seed=0).next_batch()[1]
    assert sorted(texts) == [f"grey {i}" for i in range(NUM_PAIRS)]


def test_captioned_files_in_folders_named_as_splits_are_one_source(folder: Path):
    for i in range(NUM_PAIRS):
        place = folder / ("train" if i % 2 else "test")
        place.mkdir(exist_ok=True)
        (folder / f"{i}.png").rename(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"grey {i}")
    check(".")
    assert len(set(PairStream(".", 8, NUM_PAIRS, seed=0).next_batch()[1])) == NUM_PAIRS


def test_a_bad_line_one_folder_deeper_is_named(folder: Path):
    (folder / "train").mkdir()
    (folder / "train" / "metadata.jsonl").write_text('{"file_name": "0.png", "caption": "grey"}')
    is_refused(".", r": line 1 of metadata.jsonl is .*; give each image its file_name and text, as ")
