"""Pairs of real images and archives; models by their paths."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zipfile
from collections.abc import Callable

import tiny_runs
from PIL import Image

from malformed import Case, Place


def _png(size: int = 8) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (size, size)).save(content, "png")
    return content.getvalue()


def _tar(*members: tuple[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return content.getvalue()


def _zip() -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("0.png", _png())
    return content.getvalue()


def _line(image: object = "0.png", text: object = "grey") -> bytes:
    return (json.dumps({"image": image, "text": text}) + "\n").encode()


_GOOD = {"0.png": _png()}
_BOMB = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
_PAIRS: dict[str, tuple[str, dict[str, bytes]]] = {  # name: (pretraining.data, files)
    "nothing": (" ", {}),
    "not there": ("no/such/folder", {}),
    "no list": ("no.jsonl", {}),
    "no shards": ("no/*.tar", {}),
    "no function": ("no.such.module:function", {}),
    "no option": ("hf:a/b?img=x", {}),
    "an unknown form": ("pairs.csv", {"pairs.csv": b"a,b\n"}),
    "an empty folder": (".", {}),
    "a folder without captions": (".", _GOOD),
    "a folder of captions": (".", {"0.txt": b"grey"}),
    "an empty list": ("p.jsonl", {"p.jsonl": b""}),
    "a list of texts": ("p.jsonl", {**_GOOD, "p.jsonl": b"grey\n" * 9}),
    "a list of lists": ("p.jsonl", {**_GOOD, "p.jsonl": b"[1]\n" * 9}),
    "a list without images": ("p.jsonl", {**_GOOD, "p.jsonl": b'{"text": "grey"}\n' * 9}),
    "a list without captions": ("p.jsonl", {**_GOOD, "p.jsonl": b'{"image": "0.png"}\n' * 9}),
    "a list of numbers": ("p.jsonl", {**_GOOD, "p.jsonl": _line(3) * 9}),
    "captions of numbers": ("p.jsonl", {**_GOOD, "p.jsonl": _line(text=3) * 9}),
    "a list of images that are not there": ("p.jsonl", {"p.jsonl": _line() * 9}),
    "a list of latin-1": ("p.jsonl", {**_GOOD, "p.jsonl": b'{"image": "0.png", "text": "\xe9"}\n' * 9}),
    "deep lines": ("p.jsonl", {**_GOOD, "p.jsonl": b'{"image": ' + b"[" * 50_000}),
    "images of text": ("p.jsonl", {"0.png": b"text", "p.jsonl": _line() * 9}),
    "empty images": ("p.jsonl", {"0.png": b"", "p.jsonl": _line() * 9}),
    "cut images": ("p.jsonl", {"0.png": _png(64)[:60], "p.jsonl": _line() * 9}),
    "a bomb of pixels": ("p.jsonl", {"0.png": _BOMB, "p.jsonl": _line() * 9}),
}
_SEEN_WHEN_READ = (": images of text", ": empty images", ": cut images", ": a bomb of pixels")
"""A run may skip some pictures (pretraining.max_unreadable), so it reads them when their turn comes."""
_ARCHIVES: dict[str, bytes] = {
    "empty": b"",
    "text": b"no archive",
    "zeros": bytes(1024),
    "a zip": _zip(),
    "a PNG": _png(),
    "cut": _tar(("0.png", _png(64)), ("0.txt", b"grey"))[:700],
    "without members": _tar(),
    "without captions": _tar(("0.png", _png())),
    "without images": _tar(("0.txt", b"grey")),
    "captions of latin-1": _tar(("0.png", _png()), ("0.txt", b"\xe9")),
    "images of text": _tar(("0.png", b"text"), ("0.txt", b"grey")),
    "a bomb of pixels": _tar(("0.png", _BOMB), ("0.txt", b"grey")),
    "strange names": _tar(("../../x", b"1"), ("/etc/y", b"2")),
}


def _given(data: str, files: dict[str, bytes]) -> Callable[[Place], list[str]]:
    def given(place: Place) -> list[str]:
        pairs = place.folder / "pairs"
        pairs.mkdir()
        for name, content in files.items():
            (pairs / name).write_bytes(content)
        named = str(pairs / data) if data in files or data == "." else data
        settings = {
            "num_iterations": 1,
            "pretraining.weight": 1,
            "pretraining.data": named,
            "pretraining.batch_size": 4,
        }
        return tiny_runs.arguments(
            place.model, place.run_dir, {**settings, "pretraining.batch_size": 4, "pretraining.micro_batch_size": 2}
        )

    return given


def pairs() -> list[Case]:
    """Folders and lists of captioned images."""
    return [_of_data(f"pairs: {name}", data, files) for name, (data, files) in _PAIRS.items()]


def _of_data(name: str, data: str, files: dict[str, bytes]) -> Case:
    is_late = name.endswith(_SEEN_WHEN_READ)
    return Case(name, _given(data, files), "pretraining.", code=1 if is_late else 2, may_load=is_late)


def archives() -> list[Case]:
    """Shards, and checkpoints in one file."""
    found = [_of_data(f"shard: {name}", "s.tar", {"s.tar": content}) for name, content in _ARCHIVES.items()]
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    files = {
        "empty": b"",
        "text": b"no safetensors",
        "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
        "a header of a list": struct.pack("<Q", 2) + b"[]",
        "a header of no JSON": struct.pack("<Q", 5) + b"{{{{{",
        "no tensors": struct.pack("<Q", 2) + b"{}",
        "no UNet": struct.pack("<Q", len(header)) + header + bytes(8),
        "cut tensors": struct.pack("<Q", len(header)) + header + bytes(4),
        "a zip": _zip(),
        "a page of LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    for field in ("path", "vae", "lora"):
        for name, content in files.items():
            found.append(_single_file(field, name, content))
    for ending in ("ckpt", "pt", "bin", "pth"):
        found.append(_single_file("path", f"a pickle .{ending}", b"\x80\x02}q\x00.", ending))
    return found


def _single_file(field: str, name: str, content: bytes, ending: str = "safetensors") -> Case:
    def given(place: Place) -> list[str]:
        (place.folder / f"m.{ending}").write_bytes(content)
        model = {"model.path": place.model, f"model.{field}": f"m.{ending}"}
        return [*tiny_runs.arguments(place.model, place.run_dir), *(f"--{key}={value}" for key, value in model.items())]

    # Only the loaded model shows that the tensors of a LoRA are none of its own.
    is_later = field == "lora" and name in ("no tensors", "no UNet")
    return Case(f"model.{field}: {name}", given, f"model.{field}=m.{ending}", may_load=is_later)


_MODELS = {
    "--model.path no/such/folder/here": "model.path=no/such/folder/here",
    "--model.path .": "model.path=.",
    "--model.path /": "model.path=/",
    "--model.path ~nobody/x": "model.path=~nobody/x",
    "--model.path a/b/c/d": "model.path=a/b/c/d",
    "--model.path shapes/lmc": "model.path=shapes/lmc",
    "--model.path https://example.invalid/x": "model.path=https://example.invalid/x",
    "--model.path nobody/nothing": "the hub cannot be reached",
    "--model.base no/such/folder/here": "model.base=",
    "--model.base shapes/teacher": "model.base=shapes/teacher",
    "--model.vae no/such/folder/here": "model.vae=",
    "--model.vae .": "model.vae=.",
    "--model.lora no/such/folder/here": "model.lora=",
    "--model.lora .": "model.lora=.",
    "--model.prediction epsilon": "model.prediction=epsilon",
    "--model.clip_skip 40": "model.clip_skip=40",
    "--model.image_size 9": "model.image_size=9",
    "--model.image_size [16,17]": "model.image_size=",
    "--model.variant fp8": "model.variant=fp8",
}


def models() -> list[Case]:
    """Models by their paths; test_malformed_folders.py has 160 damaged folders."""
    found = []
    for options, says in _MODELS.items():
        field, value = options.split()

        def given(place: Place, field: str = field, value: str = value) -> list[str]:
            return [*tiny_runs.arguments(place.model, place.run_dir), f"{field}={value}"]

        found.append(Case(options, given, says))
    return found
