"""Run folders and checkpoints that were damaged, and resumed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import tiny_runs

from malformed import Case, Place
from rlcm_fast.run_folder.wholeness import write_index

Damage = Callable[[Path], object]  # of a run's folder


def _newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("iteration_*"))


def _each(damage: Damage) -> Damage:
    """Does the same to every checkpoint, so that no whole one is left."""

    def work(run: Path) -> None:
        for folder in (run / "checkpoints").glob("iteration_*"):
            damage(folder)

    return work


def _state(**fields: object) -> Damage:
    """Sets fields of state.json, and leaves the index with the old checksum."""

    def work(folder: Path) -> None:
        state = json.loads((folder / "state.json").read_text()) | fields
        (folder / "state.json").write_text(json.dumps(state))

    return work


def _indexed(**fields: object) -> Damage:
    """Sets fields of state.json and writes the index anew, as if the run had written them."""

    def work(folder: Path) -> None:
        _state(**fields)(folder)
        write_index(folder)

    return work


def _holds(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content)


def _cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:40])


def _without(name: str) -> Damage:
    def work(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return work


def _flipped(name: str) -> Damage:
    def work(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 255
        (folder / name).write_bytes(content)

    return work


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def _first_shard(folder: Path) -> str:
    return str(min((folder / "engine").iterdir()).relative_to(folder))


_STATES: dict[str, Damage] = {
    "state.json is missing": _without("state.json"),
    "state.json is empty": _holds("state.json", b""),
    "state.json is cut": _cut("state.json"),
    "state.json is a list": _holds("state.json", b"[]"),
    "state.json is a number": _holds("state.json", b"3"),
    "state.json is null": _holds("state.json", b"null"),
    "state.json is deep": _holds("state.json", b"[" * 100_000),
    "state.json is not UTF-8": _holds("state.json", b"\xff\xfe{}"),
    "state.json is empty of fields": _holds("state.json", b"{}"),
    "iteration is a text": _state(iteration="two"),
    "iteration is negative": _state(iteration=-1),
    "format is a text": _state(format="x"),
    "format of the future": _state(format=99),
    "format of pickles": _state(format=1),
    "iteration is a text, written so": _indexed(iteration="two"),
    "iteration is null, written so": _indexed(iteration=None),
    "tasks are a list, written so": _indexed(tasks=[]),
    "index.json is missing": _without("index.json"),
    "index.json is empty": _holds("index.json", b""),
    "index.json is a list": _holds("index.json", b"[]"),
    "index.json is a text": _holds("index.json", b'"x"'),
    "index.json of numbers": _holds("index.json", b'{"files": {"state.json": 3}}'),
    "the weights are missing": _without("unet.safetensors"),
    "the weights are cut": _cut("unet.safetensors"),
    "the engine's folder is missing": _without("engine"),
    "the engine's folder is empty": lambda folder: _emptied(folder / "engine"),
    "a shard is missing": lambda folder: (folder / _first_shard(folder)).unlink(),
    "a shard is cut": lambda folder: _cut(_first_shard(folder))(folder),
    "a shard is empty": lambda folder: _holds(_first_shard(folder), b"")(folder),
    "a bit of the weights is flipped": _flipped("unet.safetensors"),
    "an empty folder": _emptied,
}


def _resumed(name: str, damage: Damage, says: str, *more: str) -> Case:
    def given(place: Place) -> list[str]:
        run = place.copy_of_run()
        damage(run)
        resume = [part.replace("@", str(run)) for part in more] or ["--resume=latest"]
        return [*tiny_runs.arguments(place.model, run, {"num_iterations": 3}), *resume]

    return Case(name, given, says)


def checkpoints() -> list[Case]:
    """Checkpoints without files, or with others; settings that do not go on; folders that hold no run."""
    found = []
    for name, damage in _STATES.items():
        found.append(_resumed(f"latest: {name}", _each(damage), "resume=latest"))
        found.append(
            _resumed(
                f"by its folder: {name}",
                _each(damage),
                "resume=",
                "--resume=@/checkpoints/iteration_000002",
            )
        )
    found += [
        _resumed("no checkpoints", lambda run: shutil.rmtree(run / "checkpoints"), "resume=latest"),
        _resumed("a new run in it", lambda run: None, "already holds a run", "--seed=1"),
        _resumed("a folder that is none", lambda run: None, "resume=", "--resume=@/grids"),
        _resumed("a file", lambda run: None, "resume=", "--resume=@/metrics.jsonl"),
        _resumed("the run itself", lambda run: None, "resume=", "--resume=@"),
        _resumed("fewer iterations", lambda run: None, "num_iterations=1", "--resume=latest", "--num_iterations=1"),
        _resumed("weights of nothing", lambda run: None, "resume_weights_only=", "--resume_weights_only=@/config.yaml"),
        _resumed("both", lambda run: None, "resume=latest", "--resume=latest", "--resume_weights_only=@"),
        _resumed("adapters", lambda run: None, "lora.rank", "--resume=latest", "--lora.rank=4"),
    ]
    for name in ("unet.safetensors", "state.json"):
        damage = _each(_cut(name))
        one = ["--resume_weights_only=@/checkpoints/iteration_000002", "--run_dir=elsewhere"]
        found.append(_resumed(f"weights only, by its folder: {name} is cut", damage, "resume_weights_only=", *one))
        lacks = _each(_without(name))
        found.append(_resumed(f"weights only, by its folder: {name} is missing", lacks, "resume_weights_only=", *one))
        other = ["--resume_weights_only=@", "--run_dir=elsewhere"]
        found.append(_resumed(f"weights only: {name} is cut", damage, "resume_weights_only=", *other))
    return found
