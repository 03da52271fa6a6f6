"""Assemble a diffusers pipeline from what the config names: folder or hub id, separate UNet, LoRA, scheduler.

    path          a folder with a pipeline, which stays as it is
    path          a checkpoint in one file, with configs from this package, or from `base`, which fills what it lacks
    path, base    a UNet alone, such as latent-consistency/lcm-sdxl, which goes into the pipeline `base`
    path, lora    an LCM-LoRA, such as latent-consistency/lcm-lora-sdv1-5, which is fused into the weights of `path`
    path, loras   further LoRAs, each with a scale

The last two are distilled models whose folders name the scheduler of a diffusion model. They get the scheduler of
`policy.kind`, with the same noise levels, as their model cards recommend: an LCMScheduler for consistency and auto, a
TCDScheduler for tcd, and for euler_ancestral an EulerDiscreteScheduler with trailing spacing. Under ddim they keep
their folder's. A checkpoint in one file is treated alike, but one that names its scheduler keeps it under auto.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from rlcm_fast import hub, quiet
from rlcm_fast.backbones import model_files
from rlcm_fast.backbones.config_checks import TOKENIZERS, VAES
from rlcm_fast.backbones.file_kinds import FileKind
from rlcm_fast.backbones.loading import LORA_FILE, ModelPaths, resolve_model, split_hub_file, variant_of
from rlcm_fast.backbones.lora_layouts import add_lora, read_lora
from rlcm_fast.backbones.model_checks import check_loaded, check_model, check_tokens
from rlcm_fast.backbones.model_files import COPY_ANEW, NETWORKS
from rlcm_fast.backbones.networks import BrokenWeights, Where, check_finite, class_of
from rlcm_fast.backbones.single_file import load_parts, load_vae, scheduler_of
from rlcm_fast.config import ModelConfig

_SD21 = {"sample_size": 96, "upcast_attention": True}  # 768 pixels; its attention overflows in half precision
_SET_BY_PIPELINE = {"steps_offset": 1, "clip_sample": False}  # by StableDiffusionPipeline, whatever the folder says
# Raised for a missing file, a file that is not safetensors, missing modules and other shapes.
_MISFITS = (OSError, SafetensorError, ValueError, RuntimeError)


def assemble(model: ModelConfig, dtype: torch.dtype, kind: str, notes: list[str] | None = None) -> Any:
    """Load the pipeline on the CPU, its UNet in `dtype`, the rest in float32: SDXL's VAE overflows in half precision.

    kind: of the policy; it says the scheduler of a separate UNet and of a model with a LoRA.
    notes: receives what was found in LoRAs, in words.

    Raises:
        ValueError: nothing loads from there, the parts do not fit each other, or the UNet is of another kind.
    """
    # Load the parts and check that they fit each other. A LoRA is added in float32 and then rounded to `dtype` together
    # with the weights.
    _silence_loading()
    paths = resolve_model(model)
    check_model(model)
    unet_dtype = torch.float32 if paths.lora or paths.loras else dtype
    parts = _separate_parts(paths, model, unet_dtype)
    dtypes = {"unet": unet_dtype, "default": torch.float32}
    remedy = "check the name; a repository that holds a UNet alone needs model.base"
    revision = model.revision if paths.unet is None else None
    parts["variant"] = variant_of(paths.pipeline, None if paths.unet else model.variant)
    pipeline = load_pipeline(paths.pipeline, revision, dtypes, _field(model), remedy, **parts)
    if paths.kind is not None:
        _set_scheduler(pipeline, paths.kind, model)
    _check_parts(pipeline, model)

    # Fuse the LoRAs, and choose the scheduler.
    found = [] if notes is None else notes
    if paths.lora is not None:
        found.append(fuse_lora(pipeline, paths.lora, f"model.lora={model.lora}"))
    for number, (path, scale) in enumerate(paths.loras):
        named = f"model.loras[{number}].path={model.loras[number].path}"
        found.append(fuse_lora(pipeline, path, named, scale))
    says_its_scheduler = paths.lora is None and paths.kind is not None and scheduler_of(paths.kind) is not None
    is_distilled = paths.unet is not None or paths.lora is not None or bool(paths.loras and kind != "auto")
    if is_distilled and not (kind == "auto" and says_its_scheduler):
        pipeline.scheduler = _scheduler_of(kind, pipeline.scheduler)
    pipeline.unet.to(dtype)
    return pipeline


def _separate_parts(paths: ModelPaths, model: ModelConfig, unet_dtype: torch.dtype) -> dict[str, Any]:
    """Load the parts that do not come from the pipeline: of a checkpoint in one file, a UNet alone, another VAE."""
    parts: dict[str, Any] = {}
    vae_file = paths.vae if paths.vae is not None and Path(paths.vae).is_file() else None
    if paths.kind is not None:
        with _one_line(f"model.path={model.path}", "give the pipeline that it was made for as model.base", *_MISFITS):
            is_sd21 = paths.kind.family == "sd2" and _prediction(paths.kind, model) == "v_prediction"
            changes = _SD21 if is_sd21 and model.base is None else {}
            parts |= load_parts(paths.kind, paths.pipeline, unet_dtype, paths.vae is None, changes)
    elif paths.unet is not None:
        parts["unet"] = _load_unet(paths.unet, model, unet_dtype)
    with _one_line(f"model.vae={model.vae}", "give a VAE that was made for this kind of model", *_MISFITS):
        if vae_file is not None:
            parts["vae"] = load_vae(Path(vae_file), paths.pipeline)
        elif paths.vae is not None:
            parts["vae"] = _load_vae_folder(paths.vae)
    return parts


def _load_vae_folder(path: str) -> Any:
    """Load the VAE of a folder or hub id, in float32."""
    config: Any = AutoencoderKL.load_config(path)
    if config.get("_class_name") not in VAES:
        raise OSError(f"its config.json belongs to class {config.get('_class_name')}")
    return Where(path, Path(path), None, variant_of(path, None)).load("", config["_class_name"], torch.float32)


def _set_scheduler(pipeline: Any, kind: FileKind, model: ModelConfig) -> None:
    """Give the pipeline of a single file the scheduler that the file names, and what its UNet predicts."""
    scheduler = scheduler_of(kind) or pipeline.scheduler
    wanted = _prediction(kind, model) or scheduler.config.get("prediction_type", "epsilon")
    more = {"rescale_betas_zero_snr": True} if kind.is_zero_snr else {}
    pipeline.scheduler = type(scheduler).from_config(scheduler.config, prediction_type=wanted, **more)


def _prediction(kind: FileKind, model: ModelConfig) -> str | None:
    """What the UNet of a single file predicts; None if neither the user nor the file says it."""
    return kind.prediction if model.prediction == "auto" else model.prediction


def load_pipeline(
    path: str, revision: str | None, dtype: Any, named: str, remedy: str = "check the name", **parts: Any
) -> Any:
    """Load a pipeline by `DiffusionPipeline.from_pretrained`, without the safety checker, which would blank images.

    named, remedy: the first and last words of an error. parts: modules that `path` should not provide.
    """
    is_here = Path(path).is_dir()
    with _one_line(named, COPY_ANEW if is_here else remedy, Exception):  # diffusers raises errors of any kind
        # Find the files, and the class of the pipeline.
        index: Any = DiffusionPipeline.load_config(path, revision=revision)
        kind = getattr(diffusers, str(index.get("_class_name")), None)
        if not (isinstance(kind, type) and issubclass(kind, DiffusionPipeline)):
            raise OSError(f"its model_index.json belongs to class {index.get('_class_name')}, which is no pipeline")
        model_files.parts_in(index, named)
        passed = {**({"safety_checker": None} if "safety_checker" in index else {}), **parts}
        folder = Path(path if is_here else _download(path, revision, passed))

        # Load what is small, then the networks, whose weights are checked, and then the rest.
        for name, class_name in _small_parts(index).items():
            if name not in passed:
                passed[name] = load_small_part(path, revision, name, class_name)
        where = Where(path, folder, revision, parts.get("variant"))
        dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
        for name in NETWORKS:
            class_name = (index.get(name) or (None, None))[1]
            if class_name is not None and name not in passed and class_of(class_name) is not None:
                passed[name] = where.load(name, class_name, dtypes.get(name, dtypes["default"]))
        return DiffusionPipeline.from_pretrained(path, revision=revision, dtype=dtype, use_safetensors=True, **passed)


def _download(path: str, revision: str | None, passed: Mapping[str, Any]) -> Any:
    """Downloads what a pipeline on the hub needs, and no pickles; raises OSError if its weights are pickles only."""
    try:
        return DiffusionPipeline.download(path, revision=revision, use_safetensors=True, **passed)
    except OSError as error:
        if "necessary `safetensors` weights" in str(error):
            raise OSError(f"it has its weights {model_files.PICKLED}; {model_files.CONVERT}") from error
        raise


def _small_parts(index: Any) -> dict[str, str]:
    """Returns the classes of CLIP's tokenizers and of the scheduler that an index names."""
    found = {name: (index.get(name) or (None, None))[1] for name in ("scheduler", *model_files.TOKENIZERS)}
    return {name: kind for name, kind in found.items() if kind and (name == "scheduler" or kind in TOKENIZERS)}


def load_small_part(path: str, revision: str | None, name: str, class_name: str) -> Any:
    """Loads a scheduler or a tokenizer of a folder or hub id; raises OSError if the class is not known."""
    kind: Any = getattr(diffusers if name == "scheduler" else transformers, class_name, None)
    if kind is None:
        raise OSError(f"its model_index.json says that its {name} is a {class_name}, which the library does not have")
    if Path(path).is_dir():
        return kind.from_pretrained(str(Path(path) / name))
    return kind.from_pretrained(path, subfolder=name, revision=revision or "main")


def folder_configs(model: ModelConfig) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Returns the configs of UNet and scheduler, before weights load; None where loading decides them.

    They come from a folder, or from the hub's cache.

    Raises:
        ValueError: the scheduler does not load.
    """
    paths = resolve_model(model)
    is_plain = paths.unet is None and paths.lora is None and not paths.loras
    folder = hub.cached_folder(paths.pipeline, model_files.INDEX, model.revision) if is_plain else None
    if folder is None:
        return None
    named = _field(model)
    class_name = model_files.parts_of(folder, named).get("scheduler", ("", ""))[1]
    with _one_line(named, COPY_ANEW, Exception):
        scheduler = load_small_part(str(folder), None, "scheduler", class_name)
    unet_config = model_files.read_json(folder / "unet" / "config.json", named)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    of_pipeline = str(model_files.read_json(folder / model_files.INDEX, named).get("_class_name"))
    if of_pipeline.startswith("StableDiffusion") and "XL" not in of_pipeline:
        config |= _SET_BY_PIPELINE
    return unet_config, config


def fuse_lora(pipeline: Any, lora: str, named: str, scale: float = 1.0) -> str:
    """Add scale * (alpha / rank) * B A to the weights that a LoRA (file or hub id) names; never unpickles.

    Returns which of its layers were matched, in words.
    """
    parts = {name: pipeline.components.get(name) for name in ("unet", "text_encoder", "text_encoder_2")}
    networks = {name: part for name, part in parts.items() if part is not None}
    with _one_line(named, "give a LoRA that was made for this model", *_MISFITS):
        found = read_lora(_local_lora(lora), networks)
        add_lora(found, networks, scale)
        for name, network in networks.items():
            check_finite(f"{name}, with it,", network)
    return f"{named}: {found.summary}"


def _local_lora(lora: str) -> Path:
    """Find the file of a LoRA, in the hub's cache or downloaded if it is a hub id."""
    if Path(lora).is_file():
        return Path(lora)
    repository, file = split_hub_file(lora)
    if file:
        return Path(hf_hub_download(repository, file))
    try:
        return Path(hf_hub_download(repository, LORA_FILE))
    except RemoteEntryNotFoundError:
        files = [name for name in HfApi().list_repo_files(repository) if name.endswith(".safetensors")]
        if len(files) != 1:
            found = ", ".join(files[:3])
            raise OSError(f"it has {len(files)} safetensors files ({found}, ...): give {lora}/FILE") from None
        return Path(hf_hub_download(repository, files[0]))


def _scheduler_of(kind: str, scheduler: Any) -> Any:
    """Returns the scheduler that distilled models of a kind are sampled with, with the noise levels of `scheduler`."""
    if kind in ("auto", "consistency"):
        return LCMScheduler.from_config(scheduler.config)
    if kind == "tcd":
        return TCDScheduler.from_config(scheduler.config)
    if kind == "euler_ancestral":
        return EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")
    return scheduler


def _load_unet(path: str, model: ModelConfig, dtype: torch.dtype) -> UNet2DConditionModel:
    named = f"model.path={model.path}"
    with _one_line(named, "check the name; with model.base it must be a UNet2DConditionModel's folder", *_MISFITS):
        config = UNet2DConditionModel.load_config(path, revision=model.revision)
        assert isinstance(config, dict)
        if config.get("_class_name") != UNet2DConditionModel.__name__:
            raise OSError(f"its config.json belongs to class {config.get('_class_name')}")
        where = Where(path, Path(path), model.revision, variant_of(path, model.variant))
        network: Any = where.load("", UNet2DConditionModel.__name__, dtype)
        return network


def _check_parts(pipeline: Any, model: ModelConfig) -> None:
    """Refuse parts that do not fit with one line, before the first forward pass fails on their shapes."""
    # Check that all parts are there.
    named, parts = _field(model), pipeline.components
    if not isinstance(parts.get("unet"), UNet2DConditionModel):
        raise ValueError(f"{named} has no UNet2DConditionModel; give a Stable Diffusion or LCM folder")
    encoders = [name for name in ("text_encoder", "text_encoder_2") if name in parts]
    tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
    for name in ("vae", *encoders, *tokenizers):
        if parts.get(name) is None:
            raise ValueError(f"{named} has no {name}; give a text-to-image folder (a refiner is not one)")

    # Check that the tokenizers make no tokens that the encoders do not have.
    for name, tokenizer in zip(encoders, (parts[name] for name in tokenizers), strict=True):
        check_tokens(named, tokenizer, parts[name])

    # Check its configs, which were not read before they were loaded from a hub.
    configs: dict[str, Any] = {name: parts[name].config for name in ("unet", "vae")}
    check_loaded(named, configs | {name: parts[name].config.to_dict() for name in encoders}, model)


def _field(model: ModelConfig) -> str:
    return f"model.path={model.path}" if model.base is None else f"model.base={model.base}"


@contextmanager
def _one_line(named: str, remedy: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn the errors of loading (wrong name, broken file, other shapes) into a ValueError of one line."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except kinds as error:
        reason = " ".join(str(error).split())[:200]
        if not isinstance(error, OSError | ValueError | SafetensorError):
            reason = f"{type(error).__name__}: {reason}"
        way_out = COPY_ANEW if isinstance(error, BrokenWeights) else remedy
        if hub.is_away(error):
            reason, way_out = hub.AWAY
        raise ValueError(f"{named} could not be loaded: {reason}; {way_out}") from error


def _silence_loading() -> None:
    """Silence diffusers and transformers, whose messages while loading help no user; errors are still raised."""
    if quiet.is_debug():
        return
    logging.getLogger(quiet.MISSING_WEIGHTS).setLevel("ERROR")
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
