"""The files of the model to train: on this machine, in the hub's cache, or to be downloaded, with size and licence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import OfflineModeIsEnabled, httpx

from rlcm_fast.backbones.loading import resolve_model
from rlcm_fast.backbones.model_files import parts_of
from rlcm_fast.cli.diagnoses import GB, Diagnosis, State
from rlcm_fast.config import ModelConfig
from rlcm_fast.hub import cached_folder

_WEIGHTS = (".safetensors", ".bin")
_NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")
_SECONDS = 10.0  # for an answer of the hub


def model_files(model: ModelConfig) -> list[Diagnosis]:
    """A row for the pipeline, one for a separate UNet, one for a LoRA."""
    try:
        paths = resolve_model(model)
    except ValueError as error:
        return [Diagnosis("model", State.WRONG, str(error))]
    rows = []
    if paths.kind is None or model.base is not None:  # a single file that is whole needs no pipeline
        revision = None if paths.unet else model.revision
        rows.append(_pipeline(paths.pipeline, revision, without_unet=paths.unet is not None))
    if paths.kind is not None:
        parts = ", ".join(sorted(paths.kind.parts))
        size = paths.kind.path.stat().st_size / GB
        rows.append(Diagnosis("model", State.OK, f"{paths.kind.path}, {size:.2g} GB: {parts}", {"gb": size}))
    elif paths.unet is not None:
        rows.append(_single("model: UNet", paths.unet, model.revision, "config.json"))
    for lora in [*([] if paths.lora is None else [paths.lora]), *(path for path, _ in paths.loras)]:
        rows.append(_single("model: LoRA", lora, None, "pytorch_lora_weights.safetensors"))
    if paths.vae is not None:
        rows.append(_single("model: VAE", paths.vae, None, "config.json"))
    return rows


def _pipeline(path: str, revision: str | None, without_unet: bool) -> Diagnosis:
    """The row of a pipeline's folder or hub id."""
    networks = [name for name in _NETWORKS if not (without_unet and name == "unet")]
    folder = cached_folder(path, "model_index.json", revision)
    if folder is not None:
        try:
            missing = _missing_networks(folder, path, networks)
        except ValueError as error:
            return Diagnosis("model", State.WRONG, str(error))
        if not missing:
            return _there("model", path, folder, networks)
        if Path(path).is_dir():
            return Diagnosis("model", State.WRONG, f"{path} has no weights of {', '.join(missing)}; copy it anew")
    return _on_hub("model", path, revision, networks)


def _single(what: str, path: str, revision: str | None, name: str) -> Diagnosis:
    """The row of a folder or file that holds one network."""
    place = Path(path)
    if place.is_file():
        return Diagnosis(what, State.OK, f"{path}, {place.stat().st_size / GB:.2g} GB")
    folder = place if place.is_dir() else cached_folder(path, name, revision)
    if folder is not None and _weights_in(folder):
        return _there(what, path, folder, [""])
    return _on_hub(what, path, revision, [""])


def _there(what: str, path: str, folder: Path, networks: list[str]) -> Diagnosis:
    size = sum(file.stat().st_size for name in networks for file in _weights_in(folder / name))
    where = "" if Path(path).is_dir() else f", revision {folder.name[:12]} in the hub's cache"
    return Diagnosis(what, State.OK, f"{path}, {size / GB:.2g} GB{where}", {"gb": size / GB})


def _missing_networks(folder: Path, path: str, networks: list[str]) -> list[str]:
    """The networks that a pipeline's index lists and that have no weights; raises ValueError if it is damaged."""
    listed = parts_of(folder, path)
    return [name for name in networks if name in listed and not _weights_in(folder / name)]


def _weights_in(folder: Path) -> list[Path]:
    """The files of weights in a folder: safetensors, or else .bin."""
    for suffix in _WEIGHTS:
        files = sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else []
        if files:
            return files
    return []


def _on_hub(what: str, repository: str, revision: str | None, networks: list[str]) -> Diagnosis:
    """The row of what is not here: asks the hub for size, licence and revision."""
    try:
        info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=_SECONDS)
    except OfflineModeIsEnabled:
        words = f"{repository} is not in the hub's cache, and offline mode is on; give a folder, or download it first"
        return Diagnosis(what, State.WRONG, words)
    except (httpx.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        words = f"{repository} is not in the hub's cache, and the hub cannot be asked ({reason}); give a folder"
        return Diagnosis(what, State.WRONG, words)

    # Add up what diffusers will download.
    card: Any = info.card_data or {}
    sizes = [file.size or 0 for file in info.siblings or [] if _is_downloaded(file.rfilename, networks)]
    size = sum(sizes) / GB
    words = f"{repository}, {size:.2g} GB to download, licence {card.get('license', 'not stated')}"
    return Diagnosis(what, State.DOWNLOAD, f"{words}, revision {(info.sha or '?')[:12]}", {"download_gb": size})


def _is_downloaded(name: str, networks: list[str]) -> bool:
    """Whether a file of a repository is among the weights that are loaded; not a variant such as fp16."""
    folder, _, file = name.rpartition("/")
    return folder in networks and file.endswith(".safetensors") and file.count(".") == 1
