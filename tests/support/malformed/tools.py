"""Flags and paths of the tools of `rlcm-fast`."""

from __future__ import annotations

import os
from pathlib import Path

from malformed import Case, Place, writes

_SAMPLE = ["--model", "shapes/lcm", "--prompt", "a"]
_FLAGS: dict[str, list[str]] = {  # door: flag, values separated by spaces, |, what the line names
    "sample": [
        "--num-images 100000000 0 -1 x 1025 inf|--num-images",
        "--num-steps 0 -1 x 100000 nan|--num-steps",
        "--timesteps x 1,2 -3 999,x|--timesteps",
        "--timesteps 1000,5 5000|timesteps=",
        "--guidance-scale nan inf -1 1e30 x|--guidance-scale",
        "--clip-skip 0 x 1000|--clip-skip",
        "--seed -1 x 1e3 99999999999999999999999|--seed",
        "--batch-size 0 x 100000000|--batch-size",
        "--size x 0x0 512 5x 99999x9 1e3x4|--size",
        "--max-chunks 1 5 x|--max-chunks",
        "--long never|--long",
        "--device banana meta cuda:99 cpu:x gpu|device=",
        "--out x.txt grid .|out=",
        "--nosuch 1|--nosuch",
    ],
    "evaluate": [
        "--num-images 0 -1 x 10000000|--num-images",
        "--rewards nope Nope: :x os.path:nope os: json:JSONDecoder.nope|name=",
        "--device banana|device=",
        "--prompts no.txt shapes:three hf: x|prompts=",
        "--guidance-scale nan|--guidance-scale",
    ],
    "plan": [
        "--reward-gib inf nan -1 x 1e30|--reward-gib",
        "--gpu banana|gpu=banana",
        "--processes 0 x 100000000|--processes",
        "--image-size 0 x 100000000|--image-size",
        "--config no.yaml|config=no.yaml",
        "--seed x -1|seed=",
        "--nosuch 1|--nosuch",
    ],
    "doctor": ["--processes 0 x|--processes", "--gpu banana|gpu=banana", "--seed 3|--seed"],
    "configs": ["--nosuch|--nosuch"],
    "export": [
        "--iteration -1 x 1e3|--iteration",
        "--dtype fp8|--dtype",
        "--format gguf|--format",
        "--extract-lora 0 x 1000000|--extract-lora",
        "--num-images -1 100000000|--num-images",
    ],
    "check-reward": ["--size 0 x 1000000|--size", "--arguments 3 [] {a|arguments", "--device banana|device="],
    "reward-server": [
        "--port -1 x 65536|--port",
        "--batch-size 0 x|--batch-size",
        "--most-mib 0 x 100000|--most-mib",
        "--api-key-variable NO_SUCH_VARIABLE|api-key-variable=",
    ],
    "score": ["--batch-size 0 x|--batch-size", "--images-per-prompt 0 x|--images-per-prompt"],
}
_NEEDED = {
    "sample": _SAMPLE,
    "evaluate": ["--model", "shapes/lcm", "--rewards", "jpeg_compressibility"],
    "export": ["no/such/run"],
    "check-reward": ["jpeg_compressibility"],
    "reward-server": ["--reward", "jpeg_compressibility"],
    "score": ["--images", ".", "--prompts", "p.txt", "--rewards", "jpeg_compressibility"],
}


def tools() -> list[Case]:
    """Flags of wrong values; outputs that cannot be written; models, runs and files that are not there."""
    found = []
    for door, lines in _FLAGS.items():
        for line in lines:
            options, _, says = line.partition("|")
            flag, *values = options.split()
            for value in values or [""]:
                given = [*_NEEDED.get(door, []), flag, *([value] if value else [])]
                found.append(Case(f"{flag} {value}", given, says, door))
    return found + list(_paths())


def _paths() -> list[Case]:
    below_a_file = writes("file", "x", *_SAMPLE, "--out", "@/grid.png")
    return [
        Case("no command", [], "COMMAND", "sampel"),
        Case("--out below a file", below_a_file, "out=", "sample"),
        Case("--out with a long name", [*_SAMPLE, "--out", "x" * 300 + ".png"], "out=xxx", "sample"),
        Case("--out with a NUL", [*_SAMPLE, "--out", "a\x00.png"], "out=", "sample"),
        Case("--out of a folder without rights", _without_rights, "out=", "sample"),
        Case("--out a file", writes("f", "x", *_NEEDED["score"], "--out", "@"), "out=", "score"),
        Case("--out below a file", writes("f", "x", *_NEEDED["score"], "--out", "@/x"), "out=", "score"),
        Case("--model that is not there", ["--model", "no/such/one", "--prompt", "a"], "model=no/such/one", "sample"),
        Case("--model a text file", writes("m", "x", "--model", "@", "--prompt", "a"), "model", "sample"),
        Case("--model an empty folder", _empty_folder, "model=", "sample"),
        Case("--model with a NUL", ["--model", "a\x00b", "--prompt", "a"], "model=", "sample"),
        Case("--model of 300 letters", ["--model", "x" * 300, "--prompt", "a"], "model=xxx", "sample"),
        Case("--lora that is not there", [*_SAMPLE, "--lora", "no/such/one"], "lora=no/such/one", "sample"),
        Case("--lora a text file", writes("l.safetensors", "x", *_SAMPLE, "--lora", "@"), "lora=", "sample"),
        Case("--max-chunks without --long", [*_SAMPLE, "--max-chunks", "3"], "max-chunks=3", "sample"),
        Case(
            "--negative without guidance",
            [*_SAMPLE, "--negative", "b", "--guidance-scale", "1"],
            "negative=b",
            "sample",
        ),
        Case("a run that is not there", ["no/such/run"], "no/such/run", "export"),
        Case("a run of 300 letters", ["x" * 300], "xxx", "export"),
        Case("a folder that is no run", ["."], "run=", "export"),
        Case("--relative-to alone", [".", "--relative-to", "x"], "relative-to=x", "export"),
        Case("--private alone", [".", "--private"], "private=true", "export"),
        Case("--guidance-scale of a folder", [".", "--guidance-scale", "3"], "guidance-scale=3", "export"),
        Case("--push-to-hub nowhere", [".", "--push-to-hub", "a b c"], "push-to-hub=a b c", "export"),
        Case("pictures that are not there", ["--images", "no", *_NEEDED["score"][2:]], "images=no", "score"),
        Case("a folder without pictures", ["--images", ".", *_NEEDED["score"][2:]], "images=.", "score"),
        Case("a picture of text", writes("a.png", "x", *_NEEDED["score"]), "a.png", "score"),
        Case("an empty picture", writes("a.png", "", *_NEEDED["score"]), "a.png", "score"),
        Case(
            "--image that is not there", ["jpeg_compressibility", "--image", "no.png"], "image=no.png", "check-reward"
        ),
        Case("--image of text", writes("b.png", "x", "jpeg_compressibility", "--image", "@"), "image=", "check-reward"),
        Case("--host nowhere", [*_NEEDED["reward-server"], "--host", "no.such.host.invalid"], "host=", "reward-server"),
        Case("a config of latin-1", writes("c.yaml", b"run_dir: \xe9\n", "--config", "@"), "is not UTF-8", "plan"),
        Case(
            "a config with a key twice", writes("c.yaml", "seed: 1\nseed: 2\n", "--config", "@"), "seed twice", "plan"
        ),
    ]


def _empty_folder(place: Place) -> list[str]:
    (place.folder / "empty").mkdir()
    return ["--model", "empty", "--prompt", "a"]


def _without_rights(place: Place) -> list[str]:
    """A folder that even root cannot write into: that of the processes' descriptors."""
    assert os.path.isdir("/proc/self")
    return [*_SAMPLE, "--out", str(Path("/proc/self") / "grid.png")]
