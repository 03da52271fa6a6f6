"""What `pretraining.data` may say, and what is refused before anything is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from rlcm_fast.pairs import check_source, parse_source
from rlcm_fast.pairs.sources import captioned_files, shards


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of two images and their captions, in the working folder."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("b", "a"):
        Image.new("RGB", (4, 4)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photo of {name}\n")
    return folder


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        ("shapes:all", "function"),
        ("some.module:function", "function"),
        ("photos", "captioned_files"),
        ("pairs.jsonl", "jsonl"),
        ("shards/{00..12}.tar", "webdataset"),
        ("hf:owner/name", "hub"),
    ],
)
def test_what_a_source_is_follows_from_its_form(photos: Path, data: str, kind: str):
    assert parse_source(data).kind == kind


def test_metadata_make_a_folder_an_imagefolder(photos: Path):
    (photos / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}\n')
    assert parse_source("photos").kind == "imagefolder"


def test_a_hub_dataset_has_columns_a_split_and_a_configuration():
    source = parse_source("hf:./my data?split=validation&image=jpg&text=caption&name=en")
    assert (source.path, source.split, source.image, source.caption, source.name) == (
        "./my data", "validation", "jpg", "caption", "en"
    )  # fmt: skip
    assert parse_source("hf:owner/name").split == "train"


def test_a_caption_lies_beside_its_image(photos: Path):
    files = captioned_files(parse_source("photos"))
    names = [(Path(image).name, Path(caption).name) for image, caption in files]
    assert names == [("a.png", "a.txt"), ("b.png", "b.txt")]


def test_braces_and_globs_name_shards_as_in_a_shell(photos: Path):
    for name in ("x08", "x09", "y08", "y09", "z8"):
        (photos / f"{name}.tar").touch()
    found = shards(parse_source("photos/{x,y}{08..09}.tar"))
    assert [Path(shard).stem for shard in found] == ["x08", "x09", "y08", "y09"]
    assert [Path(shard).stem for shard in shards(parse_source("photos/*8.tar"))] == ["x08", "y08", "z8"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("nowhere", "pretraining.data=nowhere is no source of images under "),
        ("shapes:three", "pretraining.data=shapes:three is no source of images under "),
        ("nowhere.jsonl", "pretraining.data=nowhere.jsonl: there is no such file under "),
        ("nowhere/*.tar", r"pretraining.data=nowhere/\*.tar matches no .tar file under "),
        ("hf:./nowhere", "pretraining.data=hf:./nowhere: there is no folder ./nowhere; give one, or a hub id"),
        ("hf:a/b/c", "pretraining.data=hf:a/b/c names no dataset; write hf:owner/name or hf:./folder"),
        ("hf:", "pretraining.data=hf: names no dataset; write hf:owner/name or hf:./folder"),
        ("hf:?split=train", "pretraining.data=hf:.split=train names no dataset; write hf:owner/name or hf:./folder"),
        ("hf:a/b?column=x", "pretraining.data=hf:a/b.column=x sets column; after . write split, image, text or name"),
        ("nowhere.at_all:pair", "pretraining.data=nowhere.at_all:pair: no module nowhere.at_all; install"),
        ("photos/empty", "pretraining.data=photos/empty holds no .jpg, .jpeg, .png, .webp; write metadata.jsonl"),
    ],
)
def test_what_is_not_there_is_refused_with_the_way_out(photos: Path, data: str, message: str):
    (photos / "empty").mkdir()
    with pytest.raises(ValueError, match=f"^{message}"):
        check_source(data)


def test_an_image_without_a_caption_is_refused(photos: Path):
    (photos / "a.txt").unlink()
    with pytest.raises(ValueError, match=r"pretraining.data=photos: photos/a.png has no caption; write metadata.jsonl"):
        check_source("photos")


def test_shards_that_braces_name_are_all_there(photos: Path):
    for name in ("0", "2"):
        (photos / f"{name}.tar").touch()
    message = r"lacks 4 of 6: photos/1.tar, photos/3.tar, photos/4.tar, ...; add them, or name fewer$"
    with pytest.raises(ValueError, match=message):
        check_source("photos/{0..5}.tar")
    with pytest.raises(ValueError, match=r"lacks 1 of 2: photos/b/\*.tar; add them"):
        check_source("photos/{,b/}*.tar")


@pytest.mark.parametrize("data", ["photos", "photos/pairs.jsonl", "photos/*.tar", "hf:a/b"])
def test_files_need_the_package_that_reads_them(photos: Path, data: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"is read by the package datasets; pip install 'rlcm_fast\[data\]'$"):
        check_source(data)


def test_images_of_a_jsonl_file_are_relative_to_it(photos: Path):
    (photos / "pairs.jsonl").write_text(json.dumps({"image": "a.png", "text": "a"}))
    check_source("photos/pairs.jsonl")
    (photos / "pairs.jsonl").write_text(json.dumps({"image": "photos/a.png", "text": "a"}))
    with pytest.raises(ValueError, match=r"its image photos/photos/a.png is not there"):
        check_source("photos/pairs.jsonl")
