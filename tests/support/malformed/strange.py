"""What a hostile user gives: pipes, devices, links that lead back, other encodings, bombs, bytes that are no text."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import tiny_runs
from PIL import Image

from malformed import Case, Place, writes

Make = Callable[[Path], object]  # of a path, which is free


def _zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _loop(path: Path) -> None:
    path.symlink_to(path.name)


def _sparse(path: Path) -> None:
    """A gigabyte of NUL in one line, which takes no room on the disk."""
    with path.open("wb") as file:
        file.truncate(2**30)


def _holds(content: str | bytes) -> Make:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


SPECIAL: dict[str, Make] = {
    "a pipe": os.mkfifo,
    "an endless file": _zeros,
    "a link to itself": _loop,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a folder": Path.mkdir,
}


def _made(name: str, make: Make, *argv: str) -> Callable[[Place], list[str]]:
    """Returns what makes a path in the place, and gives the arguments; @ in them stands for it."""

    def given(place: Place) -> list[str]:
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        return [part.replace("@", str(path)) for part in argv]

    return given


_YAML: dict[str, tuple[bytes, str]] = {
    "UTF-16": ("seed: 3\n".encode("utf-16"), "is not UTF-8"),
    "UTF-32": ("seed: 3\n".encode("utf-32"), "is not UTF-8"),
    "a byte order mark and a misspelt field": (b"\xef\xbb\xbfsead: 3\n", "sead"),
    "line ends of Windows and a misspelt field": (b"seed: 1\r\nsead: 3\r\n", "sead"),
    "line ends of old Macs and a misspelt field": (b"seed: 1\rsead: 3\r", "sead"),
    "a number as a key": (b"1: 2\n", "1"),
    "null as a key": (b"~: 2\n", "is"),
    "a list as a key": (b"? [a, b]\n: 2\n", "is"),
    "a bool as a key": (b"yes: 2\n", "is"),
    "a nested number as a key": (b"model:\n  3: x\n", "model"),
    "a tag of Python": (b"seed: !!python/name:os.system\n", "is not YAML"),
    "a tag of bytes": (b"seed: !!binary aGVsbG8=\n", "seed"),
    "a tag of a set": (b"rewards: !!set {a, b}\n", "rewards"),
    "a date": (b"seed: 2026-01-01\n", "seed"),
    "a date of month 13": (b"seed: 2026-13-41\n", "is not YAML"),
    "an unknown directive": (b"%FOO bar\n---\nsead: 3\n", "sead"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "document"),
    "a huge exponent": (b"optimizer: {lr: 1e999999999}\n", "optimizer.lr"),
    "base 60": (b"num_iterations: 1:30:0.5\n", "num_iterations"),
    "tabs": (b"model:\n\tpath: x\n", "is not YAML"),
    "a NUL": (b"seed: 3\0\n", "is not YAML"),
    "an escaped NUL": (b'run_dir: "a\\0b"\n', "run_dir"),
    "an escaped surrogate": (b'run_dir: "\\ud800"\n', "half a character, in line 1"),
    "a merge key of a number": (b"<<: 3\n", "is not YAML"),
    "an anchor that is not there": (b"seed: *a\n", "is not YAML"),
    "a list": (b"- seed\n", "holds no fields"),
    "a text": (b"seed\n", "holds no fields"),
    "HTML": (b"<!DOCTYPE html><html></html>\n", "holds no fields"),
    "a PNG": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is not UTF-8"),
    "300,000 characters": (b"# " + b"x" * 300_000 + b"\nseed: 3\n", "characters"),
}


def files() -> list[Case]:
    """Configs, prompts, run folders, checkpoints and models at paths that hold no plain file."""
    found = []
    for name, make in SPECIAL.items():
        found.append(Case(f"config: {name}", _made("a.yaml", make, "--config", "@"), "config="))
        for ending in ("txt", "jsonl"):
            given = _made(f"p.{ending}", make, "--prompts.source", "@")
            found.append(Case(f"prompts: {name}.{ending}", given, "prompts.source="))
        if name != "a folder":
            found.append(Case(f"run_dir: {name}", _made("run", make, "--run_dir", "@"), "run_dir="))
        found.append(Case(f"resume: {name}", _made("c", make, "--resume", "@"), "resume="))
        found.append(
            Case(f"weights only: {name}", _made("c", make, "--resume_weights_only", "@"), "resume_weights_only=")
        )
        for field in ("path", "vae", "lora", "base"):
            found.append(
                Case(f"model.{field}: {name}", _made("m.safetensors", make, f"--model.{field}", "@"), f"model.{field}=")
            )
        given = _made("m/model_index.json", make, "--model.path", "m")
        found.append(Case(f"model_index.json: {name}", given, "model.path=m"))
        for part in ("unet/config.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer_config.json"):
            found.append(Case(f"{part}: {name}", _in_model(part, make), "model.path=m"))
        found.append(Case(f"metrics.jsonl: {name}", _in_run("metrics.jsonl", make), "run_dir="))
        found.append(Case(f"state.json: {name}", _in_run("state.json", make), "resume=latest"))
        if name in ("a link to itself", "a folder"):
            found.append(Case(f"lock: {name}", _in_run("lock", make), "run_dir="))
    found += [
        Case(f"config: {name}", writes("a.yaml", content, "--config", "@"), says)
        for name, (content, says) in _YAML.items()
    ]
    found += [
        Case("a gigabyte in a line.txt", _made("p.txt", _sparse, "--prompts.source", "@"), "prompts.source="),
        Case("a gigabyte in a line.jsonl", _made("p.jsonl", _sparse, "--prompts.source", "@"), "prompts.source="),
        Case("a gigabyte of a config", _made("a.yaml", _sparse, "--config", "@"), "config="),
        Case("run_dir /dev/null", ["--run_dir=/dev/null"], "run_dir="),
        Case("run_dir in /proc", ["--run_dir=/proc/run"], "run_dir="),
        Case("run_dir in /sys", ["--run_dir=/sys/run"], "run_dir="),
        Case("run_dir of nothing", ["--run_dir="], "run_dir="),
        Case("run_dir of blanks", ["--run_dir=  "], "run_dir="),
        Case("run_dir of bytes that are no text", ["--run_dir=a\udcffb"], "run_dir="),
        Case("prompts of bytes that are no text", ["--prompts.source=a\udcff.txt"], "prompts.source="),
        Case("a model of bytes that are no text", ["--model.path=a\udcff"], "model.path="),
        Case("a field of bytes that are no text", ["--se\udcffed=3"], "is no field"),
        Case(
            "a surrogate in a prompt",
            writes("p.jsonl", b'{"text": "a \\ud800"}\n' * 20, "--prompts.source", "@"),
            "line 1",
        ),
        Case(
            "a key twice in a line",
            writes("p.jsonl", b'{"text": "a", "text": "b"}\n' * 20, "--prompts.source", "@"),
            "line 1",
        ),
    ]
    return found


def _in_model(part: str, make: Make) -> Callable[[Place], list[str]]:
    import shutil

    def given(place: Place) -> list[str]:
        model = Path(shutil.copytree(place.model, place.folder / "m"))
        (model / part).unlink(missing_ok=True)
        make(model / part)
        return [*tiny_runs.arguments(place.model, place.run_dir), "--model.path=m"]

    return given


def _in_run(part: str, make: Make) -> Callable[[Place], list[str]]:
    def given(place: Place) -> list[str]:
        run = place.copy_of_run()
        folders = list(run.glob("checkpoints/iteration_*")) if part == "state.json" else [run]
        for folder in folders:
            (folder / part).unlink(missing_ok=True)
            make(folder / part)
        return [*tiny_runs.arguments(place.model, run, {"num_iterations": 3}), "--resume=latest"]

    return given


def _png(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8)) -> bytes:
    """A picture with more chunks before its pixels."""
    content = io.BytesIO()
    Image.new("RGB", size).save(content, "png")
    whole = content.getvalue()
    made = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return whole[:33] + made + whole[33:]


_TEXT_BOMB = zlib.compress(bytes(200_000_000), 9)
PICTURES: dict[str, bytes] = {
    "a bomb of text": _png((b"zTXt", b"a\0\0" + _TEXT_BOMB)),
    "a bomb of a colour profile": _png((b"iCCP", b"a\0\0" + _TEXT_BOMB)),
    "cut EXIF": _png((b"eXIf", b"II*\0")),
    "no pixels": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0),
    "a GIF": b"GIF89a" + b"\xff" * 20,
    "a TIFF": b"II*\0\x08\0\0\0\xff\xff" + b"\xff" * 40,
    "an SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "a script": b"#!/bin/sh\n",
    "an EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nsystemdict\n",
}


_SCORE = ["--prompts", "p.txt", "--rewards", "jpeg_compressibility", "--images"]
_SAMPLE = ["--model", "shapes/lcm", "--num-images", "1", "--num-steps", "1", "--prompt"]
_RUN_FILES = ("metrics.jsonl", "config.yaml")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_BOMB_OF_ALIASES = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in pairwise(_LETTERS))
"""Has 2**26 values when its aliases are written out."""


def pictures() -> list[Case]:
    """Pictures that are scored, shown to a reward, or trained on."""
    found = []
    for name, content in PICTURES.items():
        found.append(Case(f"score: {name}", _made("i/a.png", _holds(content), *_SCORE, "i"), "a.png", "score"))
        given = _made("a.png", _holds(content), "jpeg_compressibility", "--image", "@")
        found.append(Case(f"check-reward: {name}", given, "image=", "check-reward"))
    for name, make in SPECIAL.items():
        found.append(Case(f"score: {name}", _made("i/a.png", make, *_SCORE, "i"), "images=i", "score"))
        given = _made("a.png", make, "jpeg_compressibility", "--image", "@")
        found.append(Case(f"check-reward: {name}", given, "image=", "check-reward"))
        found.append(Case(f"score, a folder that is {name}", _made("i", make, *_SCORE, "i"), "images=i", "score"))
    return found


def tools() -> list[Case]:
    """Tools at pipes, devices and links, and with texts that are none."""
    found = []
    for name, make in SPECIAL.items():
        for door, argv in (
            ("plan", ["--config", "@"]),
            ("rate", ["--config", "@"]),
            ("sample", ["--model", "@", "--prompt", "a"]),
            ("sample", ["--model", "shapes/lcm", "--prompt", "a", "--lora", "@"]),
            ("evaluate", ["--model", "shapes/lcm", "--rewards", "jpeg_compressibility", "--prompts", "@"]),
            ("export", ["@"]),
            ("report", ["@"]),
        ):
            flag = argv[argv.index("@") - 1].strip("-") if len(argv) > 1 else "run"
            path = "x.txt" if flag == "prompts" else "x.yaml" if flag == "config" else "x"
            found.append(Case(f"{flag}: {name}", _made(path, make, *argv), f"{flag}=", door))
        if name != "a folder":
            given = _made("o.png", make, *_SAMPLE, "a", "--out", "@")
            if name in ("a pipe", "a link to itself"):
                found.append(Case(f"out: {name}", given, "out=", "sample"))
    found += [
        Case("a prompt of half a character", [*_SAMPLE, "a\udcff"], "prompt", "sample"),
        Case("a model of half a character", ["--model", "a\udcff", "--prompt", "a"], "model=", "sample"),
        Case("an output of half a character", [*_SAMPLE, "a", "--out", "a\udcff.png"], "out=", "sample"),
        Case("a folder that is no run", ["."], "run=", "report"),
        Case("nothing", [], "RUN", "report"),
        Case("os:system", ["os:system"], "os", "check-reward"),
        Case("no name", [""], "name= is not known", "check-reward"),
        Case("a name of half a character", ["a\udcff:b"], "half a character", "check-reward"),
        Case("no model", ["--model", "", "--prompt", "a"], "model=", "sample"),
        Case("no rewards", ["--model", "shapes/lcm", "--rewards", ""], "rewards", "evaluate"),
        Case(
            "a config that is a bomb of aliases",
            _made("x.yaml", _holds(_BOMB_OF_ALIASES), "--config", "@"),
            "values",
            "plan",
        ),
        Case("a config that is a folder", ["--config", "."], "config=", "rate"),
        Case("a config that is missing", ["--config", "no.yaml"], "config=no.yaml", "rate"),
        Case("a port of text", ["--config", "shapes/rating", "--port", "x"], "port", "rate"),
        Case("a port of 65536", ["--config", "shapes/rating", "--port", "65536"], "port", "rate"),
        Case("no config", [], "config", "rate"),
    ]
    return found
