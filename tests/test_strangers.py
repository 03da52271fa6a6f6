"""Files of strangers: a pickle that would leave a file when it is loaded, at every door; the file never appears."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from torch import nn

from rlcm_fast.backbones.assembly import load_pipeline
from rlcm_fast.backbones.model_checks import check_model
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli.pictures import open_picture
from rlcm_fast.config import LoraSource, ModelConfig
from rlcm_fast.engine.old_checkpoints import read_engine
from rlcm_fast.pairs.checks import check_rows, check_source
from rlcm_fast.pairs.decoding import Decoder, Unreadable
from rlcm_fast.pairs.reading import Row
from rlcm_fast.pairs.sources import parse_source
from rlcm_fast.rewards.heads import read_tensors
from rlcm_fast.train import main

MARKER = "was_run"


class Bomb:
    """Makes the file MARKER in the working folder when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARKER,)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert not (tmp_path / MARKER).exists(), "the code of the file was run"


def pickled() -> bytes:
    return pickle.dumps({"state_dict": Bomb(), "weight": torch.zeros(2)})


def saved() -> bytes:
    """What torch.save writes: a zip archive with a pickle in it."""
    buffer = io.BytesIO()
    torch.save({"module": Bomb()}, buffer)
    return buffer.getvalue()


PICKLES = [pickled, saved]


def refused(call: Any, *words: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_the_bomb_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickled())  # noqa: S301
    assert (tmp_path / MARKER).is_dir()


@pytest.mark.parametrize("content", PICKLES)
@pytest.mark.parametrize("name", ["engine.pt", "deepspeed/mp_rank_00_model_states.pt"])
def test_a_checkpoint_of_pickles_is_not_read_without_the_flag(folder: Path, name: str, content: Any):
    file = folder / "checkpoint" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content())
    refused(lambda: read_engine(folder / "checkpoint", nn.Linear(1, 1), False), "set trust_old_checkpoint=true")


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("name", ["engine.pt", "deepspeed/mp_rank_00_model_states.pt"])
@pytest.mark.parametrize("field", ["resume", "resume_weights_only"])
def test_a_checkpoint_of_a_stranger_is_refused_at_the_command_line(
    folder: Path, tiny_lcm_folder: str, name: str, field: str, capsys: pytest.CaptureFixture[str]
):
    file = folder / "theirs" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(saved())
    (folder / "theirs" / "state.json").write_text(json.dumps({"iteration": 1, "queries": 4, "tasks": {}}))
    argv = [*tiny_runs.arguments(tiny_lcm_folder, folder / "run"), f"--{field}={folder / 'theirs'}"]
    assert main(argv) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line]
    assert line.startswith(f"error: {field}={folder / 'theirs'}")
    if field == "resume":
        assert line.endswith("if you trust where it comes from, set trust_old_checkpoint=true")


@pytest.mark.parametrize("content", PICKLES)
@pytest.mark.parametrize("name", ["model.ckpt", "model.PT", "model.bin", "model.safetensors", "no_ending"])
def test_a_model_in_one_file_is_no_pickle(folder: Path, name: str, content: Any):
    (folder / name).write_bytes(content())
    refused(lambda: Backbone.load(ModelConfig(name), torch.float32, "cpu", "auto"), name, "is a pickle")


@pytest.mark.parametrize("content", PICKLES)
@pytest.mark.parametrize("name", ["lora.pt", "lora.bin", "lora.safetensors", "lora/pytorch_lora_weights.bin"])
def test_a_lora_or_a_vae_is_no_pickle(folder: Path, tiny_lcm_folder: str, name: str, content: Any):
    (folder / "lora").mkdir()
    (folder / name).write_bytes(content())
    given = name.partition("/")[0] if "/" in name else name
    refused(lambda: check_model(ModelConfig(tiny_lcm_folder, lora=given)), "model.lora=", "is a pickle")
    refused(lambda: check_model(ModelConfig(tiny_lcm_folder, loras=[LoraSource(given)])), "model.loras[0].path=")
    if "/" not in name:
        refused(lambda: check_model(ModelConfig(tiny_lcm_folder, vae=given)), "model.vae=", "is a pickle")


@pytest.mark.parametrize("content", PICKLES)
@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder"])
def test_a_folder_with_weights_of_pickles_alone_names_the_conversion(
    folder: Path, tiny_lcm_folder: str, part: str, content: Any
):
    shutil.copytree(tiny_lcm_folder, folder / "model")
    for file in (folder / "model" / part).glob("*.safetensors"):
        file.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (folder / "model" / part / name).write_bytes(content())
    refused(lambda: check_model(ModelConfig("model")), part, "only as pickles (.bin)", "save_pretrained(NEW)")
    with pytest.raises(ValueError):
        load_pipeline("model", None, torch.float32, "model=model")


@pytest.mark.parametrize("content", PICKLES)
def test_a_pickle_beside_safetensors_is_not_read(folder: Path, tiny_lcm_folder: str, content: Any):
    shutil.copytree(tiny_lcm_folder, folder / "model")
    (folder / "model" / "unet" / "diffusion_pytorch_model.bin").write_bytes(content())
    load_pipeline("model", None, torch.float32, "model=model")


CODE = f"import os\nos.mkdir({MARKER!r})\nclass Part:\n    pass\n"


@pytest.mark.parametrize("library", ["evil", "os", "evil.part"])
@pytest.mark.parametrize("part", ["unet", "scheduler", "safety_checker"])
def test_the_code_in_a_models_folder_is_not_run(
    folder: Path, tiny_lcm_folder: str, library: str, part: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(folder)
    shutil.copytree(tiny_lcm_folder, folder / "model")
    (folder / "evil.py").write_text(CODE)
    (folder / "model" / part).mkdir(exist_ok=True)
    (folder / "model" / part / "evil.py").write_text(CODE)
    index = folder / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {part: [library, "Part"]}))
    refused(lambda: check_model(ModelConfig("model")), library, "whose code would run")
    refused(lambda: load_pipeline("model", None, torch.float32, "model=model"), "whose code would run")


@pytest.mark.parametrize("class_name", ["evil", ["evil", "Part"], "os"])
def test_the_code_of_a_pipeline_is_not_run(folder: Path, tiny_lcm_folder: str, class_name: Any):
    shutil.copytree(tiny_lcm_folder, folder / "model")
    (folder / "model" / "evil.py").write_text(CODE)
    (folder / "model" / "pipeline.py").write_text(CODE)
    index = folder / "model" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": class_name}))
    refused(lambda: load_pipeline("model", None, torch.float32, "model=model"), "which is no pipeline")


@pytest.mark.parametrize("content", PICKLES)
@pytest.mark.parametrize("name", ["head.pth", "head.pt", "head.bin", "head.safetensors"])
def test_the_weights_of_a_reward_run_no_code(folder: Path, name: str, content: Any):
    (folder / name).write_bytes(content())
    refused(lambda: read_tensors(folder / name), name, "is no file of tensors")


@pytest.mark.parametrize("content", PICKLES)
def test_the_folder_of_a_rewards_network_runs_no_code(folder: Path, content: Any):
    from tiny_rewards import save_clip

    from rlcm_fast.rewards import build_reward

    save_clip(folder / "clip")
    for file in (folder / "clip").glob("*.safetensors"):
        file.unlink()
    (folder / "clip" / "pytorch_model.bin").write_bytes(content())
    refused(
        lambda: build_reward("clip_score", {"model": str(folder / "clip")}),
        "a pickle of more than tensors, whose code would run",
    )


def test_the_code_of_a_rewards_tokenizer_is_not_run(folder: Path):
    from transformers import AutoTokenizer

    (folder / "words").mkdir()
    (folder / "words" / "evil.py").write_text(CODE)
    map_of = {"auto_map": {"AutoTokenizer": ["evil.Part", None]}, "tokenizer_class": "Part"}
    (folder / "words" / "tokenizer_config.json").write_text(json.dumps(map_of))
    (folder / "words" / "config.json").write_text(json.dumps({"model_type": "strange"}))
    with pytest.raises((ValueError, OSError)):
        AutoTokenizer.from_pretrained(folder / "words", local_files_only=True, trust_remote_code=False)


def shard(folder: Path, members: dict[str, bytes], mode: str = "w") -> str:
    file = folder / "shard.tar"
    with tarfile.open(file, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return str(file)


def picture(size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if size[0] < 1000 else "1", size).save(buffer, "PNG")
    return buffer.getvalue()


PAIR = {"a.png": picture(), "a.txt": b"a cat"}


@pytest.mark.parametrize("ending", ["pickle", "pyd", "pth", "pt", "npy", "npz"])
def test_a_pickle_in_a_shard_is_not_run(folder: Path, ending: str):
    contents = {"npy": np_object(), "npz": zipped("arr_0.npy", np_object()), "pth": saved()}
    source = shard(folder, {**PAIR, f"a.{ending}": contents.get(ending, pickled())})
    check_source(source)
    said = problem_of(source)
    assert "\n" not in said


def problem_of(source: str) -> str:
    """What reading the first rows says; empty if they can be read."""
    try:
        check_rows(source)
    except ValueError as error:
        return str(error)
    return ""


def np_object() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb()], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["../../outside.png", "/outside.png", "a/../../outside.png"])
def test_a_shard_writes_no_file(folder: Path, name: str):
    inside = folder / "inside"
    inside.mkdir()
    source = shard(inside, {name: picture(), name.replace(".png", ".txt"): b"a cat"})
    before = sorted(folder.rglob("*"))
    check_source(source)
    said = problem_of(source)
    assert "\n" not in said
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
def test_a_compressed_shard_is_refused(folder: Path, mode: str):
    refused(lambda: check_source(shard(folder, PAIR, mode)), "is compressed; unpack it to a plain .tar once")


def test_a_compressed_member_is_refused(folder: Path):
    refused(lambda: check_source(shard(folder, {**PAIR, "a.json.gz": b"\x1f\x8b"})), "a.json.gz of", "is compressed")


def test_a_shard_with_endless_brackets_is_one_line(folder: Path):
    source = shard(folder, {"a.png": picture(), "a.json": b"[" * 100_000})
    refused(lambda: check_rows(source), "make the shard again, or take it out")


def test_a_picture_of_too_many_pixels_is_refused(folder: Path):
    size = (10_000, 10_000)  # 100 million pixels in 0.3 MB
    (folder / "bomb.png").write_bytes(picture(size))
    refused(lambda: open_picture(folder / "bomb.png", "images"), "cannot be read as a picture", "pixels")
    decoder = Decoder(parse_source(str(folder / "pairs.jsonl")), (8, 8))
    for image in ({"bytes": None, "path": str(folder / "bomb.png")}, {"bytes": picture(size), "path": None}):
        found = decoder[Row(image, "a cat")]
        assert isinstance(found, Unreadable) and "pixels" in found.problem and "\n" not in found.problem


def test_a_truncated_picture_is_one_line(folder: Path):
    (folder / "cut.png").write_bytes(picture((64, 64))[:60])
    found = Decoder(parse_source(str(folder / "pairs.jsonl")), (8, 8))[
        Row({"bytes": None, "path": str(folder / "cut.png")}, "a cat")
    ]
    assert isinstance(found, Unreadable) and "cut.png cannot be read" in found.problem and "\n" not in found.problem
