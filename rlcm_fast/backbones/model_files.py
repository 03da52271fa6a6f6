"""Reads the configs of a model's folder, and sees without loading them whether its files of weights are whole.

Imports no torch. Every error is a ValueError of one line: what was given, what is wrong in which file, the way out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlcm_fast.backbones.file_kinds import PICKLES, num_tensor_bytes

INDEX = "model_index.json"
NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
TOKENIZERS = ("tokenizer", "tokenizer_2")
COPY_ANEW = "copy or download the folder anew"

LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
"""The libraries that an index may name; the last one is how diffusers calls the place of the safety checker."""
CONVERT = (
    "convert them where you trust them, with diffusers: DiffusionPipeline.from_pretrained(FOLDER).save_pretrained(NEW)"
)
PICKLED = "only as pickles (.bin), and reading one may run any code that is in it"

_WEIGHTS = re.compile(r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d+-of-\d+)?\.safetensors")
_LFS = b"version https://git-lfs"
_MOST_BYTES_OF_A_HEADER = 100_000_000  # the limit of safetensors itself


def refusal(named: str, reason: str, remedy: str) -> ValueError:
    """Returns the error of a model that cannot be used; its message is one line."""
    return ValueError(f"{named} could not be loaded: {reason}; {remedy}")


def read_json(file: Path, named: str) -> dict[str, Any]:
    """Reads a file that must hold a JSON object.

    Raises:
        ValueError: it is missing or damaged; the message begins with `named`.
    """
    shown = "/".join(file.parts[-2:])
    _check_plain(file, shown, named)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise refusal(named, f"it has no {shown}", COPY_ANEW) from None
    except (OSError, ValueError, RecursionError) as error:
        cause = "is empty" if file.is_file() and file.stat().st_size == 0 else f"is damaged ({error})"
        raise refusal(named, f"{shown} {cause}", COPY_ANEW) from None
    if not isinstance(found, dict):
        raise refusal(named, f"{shown} holds a {type(found).__name__} and no JSON object", COPY_ANEW)
    return found


def _check_plain(file: Path, shown: str, named: str) -> None:
    """Raises ValueError for a pipe, a device or a folder: reading it may never end."""
    if os.path.lexists(file) and not file.is_file():
        raise refusal(named, f"{shown} is no plain file", COPY_ANEW)


def parts_of(folder: Path, named: str) -> dict[str, tuple[str, str]]:
    """Returns the library and class of each part that the index of a folder names; raises ValueError for others."""
    return parts_in(read_json(folder / INDEX, named), named)


def parts_in(index: Mapping[str, Any], named: str) -> dict[str, tuple[str, str]]:
    """Returns the library and class of each part that an index names; raises ValueError for what is none of LIBRARIES.

    A class of another library would be imported, and its code would run.
    """
    parts = {}
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, list):
            continue
        if len(entry) != 2 or not all(one is None or isinstance(one, str) for one in entry):
            raise refusal(named, f"{INDEX} says {name}={entry}, which names no library and class", COPY_ANEW)
        library, class_name = entry
        if library is not None and library not in LIBRARIES:
            reason = f"{INDEX} says that its {name} is a {class_name} of {library}, whose code would run"
            raise refusal(named, reason, f"give a model whose parts are of {LIBRARIES[0]} and {LIBRARIES[1]}")
        if library is not None and class_name is not None:
            parts[name] = (library, class_name)
    return parts


def check_tokenizer_files(folder: Path, named: str) -> None:
    """Raises ValueError if a tokenizer's files are missing or damaged."""
    has_both = (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()
    if not has_both and not (folder / "tokenizer.json").is_file():
        raise refusal(named, f"{folder.name} has no tokenizer.json, nor vocab.json and merges.txt", COPY_ANEW)
    for name in ("tokenizer.json", "vocab.json", "special_tokens_map.json"):
        if os.path.lexists(folder / name):
            read_json(folder / name, named)


def check_weights(folder: Path, named: str, variant: str | None) -> None:
    """Raises ValueError if a network's folder has no weights, or a file of them is cut off or no safetensors file."""
    found = [file for file in folder.glob("*.safetensors") if _WEIGHTS.fullmatch(file.name)]
    wanted = [file for file in found if _variant(file) == variant] or [file for file in found if not _variant(file)]
    listed = {folder / name for index in folder.glob("*.safetensors.index.json") for name in _shards(index, named)}
    missing = sorted(file.name for file in listed if not file.is_file() and _variant(file) in (variant, None))
    if missing and (variant is None or not wanted):
        raise refusal(named, f"{folder.name} lacks {missing[0]}, which its index names", COPY_ANEW)
    if not wanted and any(file.suffix.lower() in PICKLES for file in folder.glob("*")):
        raise refusal(named, f"{folder.name} has its weights {PICKLED}", CONVERT)
    if not wanted:
        raise refusal(named, f"{folder.name} has no weights (no .safetensors file)", COPY_ANEW)
    for file in sorted(wanted):
        check_whole(file, named)


def _variant(file: Path) -> str | None:
    match = _WEIGHTS.fullmatch(file.name)
    return match["variant"] if match else None


def has_variant(folder: Path, variant: str | None) -> bool:
    """Tells whether a network's folder has weights of a variant."""
    return variant is not None and any(
        f".{variant}." in file.name or f".{variant}-" in file.name for file in folder.glob("*")
    )


def _shards(index: Path, named: str) -> set[str]:
    weight_map = read_json(index, named).get("weight_map")
    if not isinstance(weight_map, Mapping):
        raise refusal(named, f"{index.parent.name}/{index.name} has no weight_map", COPY_ANEW)
    names = {str(name) for name in weight_map.values()}
    strange = next((name for name in sorted(names) if Path(name).name != name or len(name.encode()) > 255), None)
    if strange is not None:
        raise refusal(named, f"{index.name} names {strange[:60]!r}, which is no file of its folder", COPY_ANEW)
    return names


def check_whole(file: Path, named: str) -> None:
    """Raises ValueError if a safetensors file has no header, or not as many bytes as that says."""
    shown = f"{file.parent.name}/{file.name}"
    _check_plain(file, shown, named)
    size = file.stat().st_size
    with file.open("rb") as content:
        start = content.read(len(_LFS))
        if start == _LFS:
            raise refusal(named, f"{shown} is a pointer of Git LFS and no weights", "run git lfs pull in its folder")
        content.seek(0)
        length = int.from_bytes(content.read(8), "little")
        header: Any = None
        if size >= 8 + length and length <= _MOST_BYTES_OF_A_HEADER:
            try:
                header = json.loads(content.read(length))
            except (ValueError, RecursionError):
                header = None
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    num_bytes = num_tensor_bytes(header)
    if num_bytes is None:
        raise refusal(named, f"{shown} of {size} bytes is no safetensors file, or is cut off", COPY_ANEW)
    expected = 8 + length + num_bytes
    if size < expected:
        raise refusal(named, f"{shown} is cut off: it has {size} of {expected} bytes", COPY_ANEW)
