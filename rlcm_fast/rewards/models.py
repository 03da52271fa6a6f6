"""Finds the files of a reward's models, says what is missing, and says what was used.

A model is named by a folder, a file, or a hub id, which may end in a revision: `owner/name@revision`. Files of the
hub are taken from its cache if they are all there; no network is asked then. Else they are downloaded, unless
HF_HUB_OFFLINE is set.

    check_files          before any weights load: a lookup of names
    ModelFiles.folder    downloads what is missing
    OnModels.used        for environment.json
"""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub import constants, model_info, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

from rlcm_fast.config.files import local_path
from rlcm_fast.finite_json import load_json
from rlcm_fast.rewards.facts import EITHER, OPTIONAL, Facts, Weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".onnx")  # of files; hub ids have none of them
_SHA256 = re.compile(r"[0-9a-f]{64}")
_HASHED_WHOLE = 64 * 2**20  # bytes; of a larger file that does not come from the hub, only the first bytes are hashed


class OnModels:
    """The base of rewards, and of their parts, that compute on models: which files they need, and what they used."""

    FACTS: ClassVar[Facts | None] = None  # None: another class that an argument names has them
    asks_server: bool = False  # what computes the scores is elsewhere, and may charge for them
    _files: Sequence[ModelFiles] = ()  # set by the constructor

    @classmethod
    def files(cls, arguments: Mapping[str, Any]) -> list[ModelFiles]:
        """The files that the class needs with `arguments`, which hold every argument of the constructor.

        Raises ValueError for an argument, or a missing package, that shows before any file is opened.
        """
        raise NotImplementedError

    @classmethod
    def part(cls, arguments: Mapping[str, Any]) -> tuple[str, Any] | None:
        """The argument that holds the arguments of the part that computes on models, and the class of the part.

        None if the class itself does. Raises ValueError for a part that does not exist.
        """
        return None

    @property
    def used(self) -> dict[str, Any]:
        """What the instance computes on, as JSON: by argument, the model, its revision, sizes and hashes of files."""
        return {files.field: files.used() for files in self._files}


def with_defaults(factory: Any, arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Every argument that `factory`, a class, gets with `arguments`; None if it computes on no models.

    None, too, for arguments that do not fit the constructor, which will say so better.
    """
    if not (isinstance(factory, type) and issubclass(factory, OnModels)):
        return None
    try:
        bound = inspect.signature(factory).bind(**(arguments or {}))
    except TypeError:
        return None
    bound.apply_defaults()
    return dict(bound.arguments)


def files_of(factory: Any, arguments: Mapping[str, Any] | None) -> list[ModelFiles]:
    """The files that `factory`, a class, needs with `arguments`; none if it computes on no models.

    Raises ValueError for an argument that is wrong.
    """
    given = with_defaults(factory, arguments)
    return [] if given is None else factory.files(given)


def check_files(factory: Any, arguments: Mapping[str, Any]) -> list[str]:
    """Look up the files that `factory`, a class, needs with `arguments`; no weights load.

    Returns what has to be downloaded, in words. Raises ValueError for what is missing.
    """
    given = with_defaults(factory, arguments) or {}
    if {"dtype", "device", "batch_size"} <= given.keys():
        Placement.check(given["dtype"], given["device"], given["batch_size"])
    downloads = [files.download() for files in files_of(factory, arguments)]
    return [download for download in downloads if download]


def found(files: list[ModelFiles]) -> list[ModelFiles]:
    """Return `files` after a look at all of them, so that a missing one is named before another downloads or loads."""
    for needed in files:
        needed.find()
    return files


@dataclass(frozen=True)
class Placement:
    """The device and the precision of a network, and how many images it gets at once."""

    dtype: torch.dtype
    device: torch.device
    batch_size: int

    @staticmethod
    def check(dtype: str, device: str, batch_size: int) -> None:
        """Raise ValueError unless `of` takes these arguments; begins no CUDA context, which would cost memory."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype} is unknown; give {', '.join(DTYPES)}")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size} is no number of images; give 1 or more, such as 32")
        if device in ("same", "cpu"):
            return
        number, num_gpus = re.fullmatch(r"cuda:(\d+)", str(device)), torch.cuda.device_count()
        if number is None:
            raise ValueError(f"device={device} is unknown; give same, cpu or cuda:N")
        if int(number[1]) >= num_gpus:
            raise ValueError(f"device={device} is not there: this process sees {num_gpus} GPUs; give same, or cpu")

    @staticmethod
    def of(dtype: str, device: str, batch_size: int) -> Placement:
        """The placement that a reward's arguments name.

        dtype: fp32, bf16 or fp16. device: "same" (the process's GPU, or the CPU), "cpu" or "cuda:N". Raises ValueError.
        """
        Placement.check(dtype, device, batch_size)
        is_on_own_gpu = device == "same" and torch.cuda.is_available()
        place = f"cuda:{torch.cuda.current_device()}" if is_on_own_gpu else device.replace("same", "cpu")
        return Placement(DTYPES[dtype], torch.device(place), batch_size)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} on {self.device}"


@dataclass(frozen=True)
class ModelFiles:
    """The files of one model that an argument of a reward names."""

    field: str  # the argument: model, head, ...
    source: str  # its value: folder, file, or hub id with or without @revision
    weights: Weights  # which files it must have

    def find(self) -> Path | None:
        """The folder that holds the files, or the file itself; None if they have to be downloaded first.

        Raises ValueError with what is missing, where it comes from, its size and licence, and the way out.
        """
        # A folder or a file on this machine.
        if not self.source:
            raise ValueError(f"{self.field}= is empty; give the file: {self._what()}")
        place = local_path(self.source)
        if place.is_file():
            if any(name.endswith(".json") for name in self.names()):  # a model of several files
                raise ValueError(f"{self.field}={self.source} is a file; give the folder; {self._what()}")
            return place
        if place.is_dir():
            missing = _missing(place, self.weights.files)
            if missing:
                raise ValueError(f"{self.field}={self.source} lacks {missing}; {self._what()}")
            return place
        if not _may_be_hub_id(self.source):
            raise ValueError(f"{self.field}={self.source} does not exist; give a folder, or a hub id; {self._what()}")

        # The cache of the hub.
        folder = self._cached()
        if folder is None and constants.HF_HUB_OFFLINE:
            repository, revision = self._id()
            names = " ".join(name for needed in self.weights.files for name in _names(needed) if name[-4:] != ".bin")
            raise ValueError(
                f"{self.field}={self.source} is not in the hub's cache, and HF_HUB_OFFLINE is set; {self._what()}; run "
                f'"hf download {repository} {names} --revision {revision}" where there is a network, or give a folder'
            )
        return folder

    def folder(self) -> Path:
        """The folder that holds the files, or the file itself, after a download if they are not on this machine.

        Raises ValueError if the download fails or lacks a file.
        """
        # Take what is there.
        found = self.find()
        if found is not None:
            return found

        # Download; the hub's cache locks each file, so several processes do this once.
        repository, revision = self._id()
        try:
            there = [file.rfilename for file in model_info(repository, revision=revision).siblings or ()]
            folder = snapshot_download(
                repository, revision=revision, allow_patterns=_patterns(self.weights.files, there)
            )
        except (OSError, ValueError, HTTPError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"{self.field}={self.source} cannot be downloaded: {reason}; {self._what()}; or give a folder"
            ) from error
        missing = _missing(Path(folder), self.weights.files)
        if missing:
            raise ValueError(f"{self.field}={self.source} has no {missing}; {self._what()}")
        return Path(folder)

    def file(self) -> Path:
        """The path of the first needed file, whichever of its names it has."""
        place = self.folder()
        if place.is_file():
            return place
        return next(place / name for name in self.names() if (place / name).is_file())

    def names(self) -> list[str]:
        """The names that the first needed file may have, best first."""
        return _names(self.weights.files[0])

    def used(self) -> dict[str, Any]:
        """What was read, as JSON: the model, its revision on the hub, and size and hash of each file."""
        place = self.folder()
        if place.is_file():
            return {"model": self.source, "revision": None, "files": {place.name: _fingerprint(place)}}
        is_hub = not local_path(self.source).is_dir()
        files = [place / name for needed in self.weights.files for name in _names(needed) if (place / name).is_file()]
        files += [place / name for file in files for name in _listed(file)]
        return {
            "model": self.source,
            "revision": place.name if is_hub else None,
            "files": {file.name: _fingerprint(file) for file in files},
        }

    def download(self) -> str:
        """What a run will download, in words; empty if it is on this machine. Raises what `find` raises."""
        if self.find() is not None:
            return ""
        is_default = self._id()[0] == self.weights.source
        return f"{self.source}, {self._size()}" if is_default else f"{self.source}, of unknown size and licence"

    def _cached(self) -> Path | None:
        """The folder in the hub's cache, if all needed files are there."""
        repository, revision = self._id()
        for needed in self.weights.files:
            for name in _names(needed):
                path = try_to_load_from_cache(repository, name, revision=revision)
                if isinstance(path, str):
                    folder = Path(path).parents[len(Path(name).parts) - 1]
                    return None if _missing(folder, self.weights.files) else folder
        return None

    def _id(self) -> tuple[str, ...]:
        """The hub id and the revision, or "main"."""
        repository, _, revision = self.source.partition("@")
        return repository, revision or "main"

    def _size(self) -> str:
        return f"{self.weights.gigabytes:.2g} GB, licence {self.weights.licence}"

    def _what(self) -> str:
        """What is wanted, where it comes from, its size and licence."""
        default = f" ({self.weights.source})" if self.weights.source else ""
        return f"it comes from {self.weights.where}{default}, {self._size()}"


def _names(needed: str) -> list[str]:
    """The names of a needed file, best first."""
    return needed.removesuffix(OPTIONAL).split(EITHER)


def _missing(folder: Path, files: tuple[str, ...]) -> str:
    """The first needed file that is not in the folder; empty if all are there."""
    for needed in files:
        there = [name for name in _names(needed) if (folder / name).is_file()]
        if not there and not needed.endswith(OPTIONAL):
            return " or ".join(_names(needed))
        for name in there:
            absent = [shard for shard in _listed(folder / name) if not (folder / shard).is_file()]
            if absent:
                return absent[0]
    return ""


def _patterns(files: tuple[str, ...], there: list[str]) -> list[str]:
    """What to download of the files that are `there`: of each needed file the best name, and an index's shards."""
    best = [name for needed in files for name in [name for name in _names(needed) if name in there][:1]]
    shards = [name.replace(".safetensors.index.json", "-*.safetensors") for name in best if _is_index(name)]
    return [*best, *shards]


def _is_index(name: str) -> bool:
    return name.endswith(".safetensors.index.json")


def _listed(file: Path) -> list[str]:
    """The names that a file lists if it is an index of weights; else none."""
    if not _is_index(file.name):
        return []
    try:
        return sorted({str(name) for name in load_json(file.read_bytes())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is no index of weights ({error}); copy or download its folder anew") from error


def _may_be_hub_id(source: str) -> bool:
    """Tells whether `source` has the form of a hub id, not of a file, and begins with no folder that exists."""
    name = source.partition("@")[0]
    owner, slash, _ = name.partition("/")
    return bool(_HUB_ID.fullmatch(name)) and not name.endswith(_ENDINGS) and not (slash and Path(owner).is_dir())


def _fingerprint(file: Path) -> dict[str, Any]:
    """Size and hash of a file: the hub's own hash, or of the whole file, or of the first bytes of a large one."""
    size = file.stat().st_size
    blob = file.resolve().name  # the hub's cache names large files by their hash
    if _SHA256.fullmatch(blob):
        return {"bytes": size, "sha256": blob}
    with file.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_HASHED_WHOLE)).hexdigest()
    return {"bytes": size, "sha256" if size <= _HASHED_WHOLE else "sha256_of_first_64_mib": digest}
