"""A checkpoint that lacks anything, or holds other bytes than were written, is damaged and says where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_policies import TinyNetwork, engine_of

from rlcm_fast import parallel
from rlcm_fast.run_folder.checkpoint import check_format, complete, damage, newest_whole, save_checkpoint, weights

pytestmark = pytest.mark.usefixtures("one_process")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a real engine."""
    return save_checkpoint(tmp_path, 1, engine_of(TinyNetwork(), 1, stage=1), {"iteration": 1}, keep=2)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def flipped(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def files_of(folder: Path) -> list[str]:
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())


def test_a_checkpoint_has_shards_the_weights_its_state_and_an_index_of_all_files(folder: Path):
    shards = [f"engine/{name}" for name in ("shard_00000_of_00001.json", "states_00000_of_00001.safetensors")]
    shards.append("engine/weights_00000_of_00001.safetensors")
    assert files_of(folder) == [*shards, "index.json", "state.json", "unet.safetensors"]
    index = json.loads((folder / "index.json").read_text())["files"]
    assert sorted([*index, "index.json"]) == files_of(folder)
    assert all(entry["bytes"] == (folder / name).stat().st_size for name, entry in index.items())
    assert json.loads((folder / "state.json").read_text()) == {"iteration": 1, "format": 2, "num_processes": 1}
    assert weights(folder).keys() == TinyNetwork().state_dict().keys()
    assert damage(folder) is None


@pytest.mark.parametrize("harm", [Path.unlink, truncated, emptied, flipped])
def test_harm_to_any_file_is_found_and_the_checkpoint_before_is_taken(harm: Any, folder: Path, tmp_path: Path):
    newer = tmp_path / "checkpoints" / "iteration_000002"
    for name in files_of(folder):
        shutil.rmtree(newer, ignore_errors=True)
        shutil.copytree(folder, newer)
        harm(newer / name)
        fault = damage(newer)
        assert fault and Path(name).name in fault and "\n" not in fault
        said: list[str] = []
        assert newest_whole(tmp_path, said.append) == folder
        assert said == [f"checkpoint {newer} is damaged ({fault}): the one before it is looked at"]


@pytest.mark.parametrize(
    ("text", "fault"),
    [("", "state.json is empty"), ("{", "state.json is no JSON"), ("3", "state.json is no JSON")],
)
def test_what_a_state_must_be(text: str, fault: str, folder: Path):
    (folder / "state.json").write_text(text)
    assert damage(folder) == fault


@pytest.mark.parametrize("text", ["{}", '{"files": 3}', '{"files": {}}', '{"files": {"state.json": 3}}'])
def test_an_index_of_another_form_is_damage(text: str, folder: Path):
    (folder / "index.json").write_text(text)
    assert damage(folder) == "index.json is no list of files with their lengths and checksums"


def test_if_none_is_whole_none_is_taken(folder: Path, tmp_path: Path):
    (folder / "state.json").unlink()
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) is None
    assert len(said) == 1


def test_only_names_of_iterations_are_checkpoints_and_they_are_ordered_by_number(folder: Path, tmp_path: Path):
    for name in ("iteration_x", "iteration_000002_copy", "iteration_12", ".partial_iteration_000003"):
        shutil.copytree(folder, folder.with_name(name))
    for name in ("iteration_999999", "iteration_1000000"):
        shutil.copytree(folder, folder.with_name(name))
    folder.with_name("iteration_000002").write_text("a file")
    assert [path.name for path in complete(tmp_path)] == ["iteration_000001", "iteration_999999", "iteration_1000000"]


def test_a_checkpoint_of_a_newer_version_is_refused(folder: Path):
    (folder / "state.json").write_text(json.dumps({"format": 3}))
    with pytest.raises(ValueError, match="has format 3, and this version reads up to 2; install the version of rlcm_"):
        check_format(folder, trusts_old=True)


def test_every_process_describes_its_own_files(folder: Path, monkeypatch: pytest.MonkeyPatch):
    from rlcm_fast.engine.shards import is_of_this_process

    monkeypatch.setattr(parallel, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    names = ("state.json", "ema.safetensors", "engine/weights_00000_of_00002.safetensors")
    assert not any(is_of_this_process(folder / name) for name in names)
    assert is_of_this_process(folder / "engine" / "weights_00001_of_00002.safetensors")
