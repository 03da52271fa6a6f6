"""Refuses a model's folder before its weights load: parts that are missing, damaged, or do not fit each other.

Reads the configs and the headers of the weights; imports no torch. Of a model on a hub, it fetches the configs first;
what only its weights show is looked at once they are here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlcm_fast.backbones import config_checks, model_files
from rlcm_fast.backbones.config_checks import PartConfig
from rlcm_fast.backbones.file_kinds import LAYOUTS
from rlcm_fast.backbones.loading import ModelPaths, resolve_model, variant_of
from rlcm_fast.backbones.model_files import COPY_ANEW, INDEX, NETWORKS, refusal
from rlcm_fast.config import ModelConfig
from rlcm_fast.hub import check_there, fetch_configs

_ENCODERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}


def check_model(model: ModelConfig) -> None:
    """Checks the folders of a model that are on this machine.

    Raises:
        ValueError: a part is missing, damaged, or does not fit the others, or a config asks for what nothing obeys.
    """
    paths = resolve_model(model)
    folder = Path(paths.pipeline)
    if folder.parent == LAYOUTS or not folder.is_dir():
        return
    check_folder(folder, model, paths)


def check_hub(model: ModelConfig) -> None:
    """Checks what a hub has of a model: that it can be reached, and the configs, before weights are downloaded.

    Raises:
        ValueError: as `check_model`, or the hub gives no answer or has no such model.
    """
    # Ask for what is not on this machine, each with the field that names it.
    paths = resolve_model(model)
    found = {
        "base" if model.base else "path": paths.pipeline,
        "path" if model.base else "unet": paths.unet,
        "lora": paths.lora,
        "vae": paths.vae,
    }
    found |= {f"loras[{number}].path": path for number, (path, _) in enumerate(paths.loras)}
    away = {field: path for field, path in found.items() if path is not None and not Path(path).exists()}
    for field, path in away.items():
        check_there(path, f"model.{field}={path}")

    # Fetch the configs of its networks, and check them as those of a folder.
    revised = paths.unet or paths.pipeline
    folders = {
        path: str(fetch_configs(path, model.revision if path == revised else None, f"model.{field}={path}"))
        for field, path in away.items()
        if "lora" not in field
    }
    if folders:
        here = {name: folders.get(path, path) for name, path in paths._asdict().items() if isinstance(path, str)}
        _check_parts(Path(here["pipeline"]), model, paths._replace(**here))


def is_of_this_kind(folder: Path, named: str) -> bool:
    """Tells whether the index of a folder names a UNet of Stable Diffusion's kind."""
    return model_files.parts_of(folder, named).get("unet", ("", ""))[1] == config_checks.UNET


def check_loaded(named: str, configs: Mapping[str, Mapping[str, Any]], model: ModelConfig) -> None:
    """Checks the configs of networks that are loaded, by their names; raises ValueError as `check_model` does."""
    parts = {name: PartConfig(named, f"{name}/config.json", config) for name, config in configs.items()}
    _check_configs(named, parts, model, [name for name in _ENCODERS if name in parts])


def check_tokens(named: str, tokenizer: Any, encoder: Any) -> None:
    """Raises ValueError if a tokenizer has no marks of begin, end and padding, or tokens that its encoder has not."""
    missing = [key for key in ("bos_token_id", "eos_token_id", "pad_token_id") if getattr(tokenizer, key) is None]
    if missing:
        raise refusal(named, f"its tokenizer has no {missing[0].removesuffix('_id')}", "correct tokenizer_config.json")
    highest, size = max(tokenizer.get_vocab().values()), encoder.config.vocab_size
    if highest >= size:
        raise refusal(named, f"its tokenizer has the token {highest}, and its text encoder {size} tokens", COPY_ANEW)


def check_folder(folder: Path, model: ModelConfig, paths: ModelPaths) -> None:
    """Checks the folder of a pipeline, its parts from elsewhere included; raises ValueError as `check_model` does."""
    # Check what the configs say, then the files beside them.
    here = _check_parts(folder, model, paths)
    named = _named(model)
    for name in model_files.TOKENIZERS:
        if name in here:
            model_files.check_tokenizer_files(folder / name, named)

    # Look at the headers of the weights.
    for path, field, wanted in ((paths.unet, "path", model.variant), (paths.vae, "vae", None)):
        if path is not None and Path(path).is_dir():
            shown = f"model.{field}={getattr(model, field)}"
            model_files.check_weights(Path(path), shown, variant_of(path, wanted))
    variant = variant_of(str(folder), None if paths.unet else model.variant)
    if variant is not None and "unet" in here and not model_files.has_variant(folder / "unet", variant):
        raise ValueError(f"model.variant={variant} is no variant of the files in {folder / 'unet'}; leave it out")
    for name in NETWORKS:
        if name in here:
            model_files.check_weights(folder / name, named, variant)


def _named(model: ModelConfig) -> str:
    return f"model.path={model.path}" if model.base is None else f"model.base={model.base}"


def _check_parts(folder: Path, model: ModelConfig, paths: ModelPaths) -> set[str]:
    """Checks the configs of a pipeline's parts, and returns the networks and tokenizers that come from its folder.

    Raises:
        ValueError: as `check_model`, but for what only the files of weights and of tokenizers show.
    """
    # Find the parts that come from the folder, and check that they are there.
    named = _named(model)
    parts = model_files.parts_of(folder, named)
    _check_classes(named, parts, is_whole=paths.unet is None)
    others = set() if paths.kind is None else set(paths.kind.parts)
    others |= ({"unet"} if paths.unet else set()) | ({"vae"} if paths.vae else set())
    here = [name for name in NETWORKS if name in parts and name not in others]

    # Read their configs, and those of parts from elsewhere.
    configs = {name: _config(folder / name, named) for name in here}
    for other, path, field in (
        ("unet", paths.unet, f"model.path={model.path}"),
        ("vae", paths.vae, f"model.vae={model.vae}"),
    ):
        if path is not None and Path(path).is_dir():
            configs[other] = _config(Path(path), field)

    # Compare them.
    encoders = [name for name in _ENCODERS if name in parts]
    _check_configs(named, configs, model, encoders)
    tokenizers = [name for encoder, name in _ENCODERS.items() if name in parts and encoder in configs]
    for encoder, name in _ENCODERS.items():
        if name in tokenizers:
            if not (folder / name).is_dir():
                raise refusal(named, f"it has no folder {name}, which {INDEX} names", COPY_ANEW)
            file = folder / name / "tokenizer_config.json"  # without it, a tokenizer makes texts of any length
            part = PartConfig(named, f"{name}/{file.name}", model_files.read_json(file, named))
            config_checks.check_tokenizer(part, configs[encoder])
    model_files.read_json(folder / "scheduler" / "scheduler_config.json", named)
    return {*here, *tokenizers}


def _config(folder: Path, named: str) -> PartConfig:
    return PartConfig(named, f"{folder.name}/config.json", model_files.read_json(folder / "config.json", named))


def _check_classes(named: str, parts: dict[str, tuple[str, str]], is_whole: bool) -> None:
    """Raises ValueError if the index names no text-to-image pipeline of a kind that is known here."""
    if is_whole and parts.get("unet", ("", ""))[1] != config_checks.UNET:
        raise ValueError(f"{named} has no UNet2DConditionModel; give a Stable Diffusion or LCM folder")
    encoders = [name for name in _ENCODERS if name in parts] or ["text_encoder"]
    if "text_encoder_2" in encoders:
        encoders = list(_ENCODERS)
    for name in ("vae", *encoders, *(_ENCODERS[name] for name in encoders), "scheduler"):
        if name not in parts:
            raise ValueError(f"{named} has no {name}; give a text-to-image folder (a refiner is not one)")
    known: dict[str, tuple[str, ...]] = {"vae": config_checks.VAES}
    for name in encoders:
        known[name] = config_checks.TEXT_ENCODERS if len(encoders) == 2 else config_checks.TEXT_ENCODERS[:1]
        known[_ENCODERS[name]] = config_checks.TOKENIZERS
    for name, classes in known.items():
        if parts[name][1] not in classes:
            reason = f"{INDEX} says that its {name} is a {parts[name][1]}"
            raise refusal(named, reason, f"give a model with {' or '.join(classes)}")


def _check_configs(named: str, configs: dict[str, PartConfig], model: ModelConfig, encoders: Sequence[str]) -> None:
    """Raises ValueError for values that no part can have, and for parts that do not fit each other.

    encoders: the names of the text encoders, also of those whose configs are not here.
    """
    channels = None  # of a UNet that is not here
    if "unet" in configs:
        config_checks.check_class(configs["unet"], (config_checks.UNET,))
        channels = config_checks.check_unet(configs["unet"], has_own_size=model.pixels is not None)
    if "vae" in configs:
        config_checks.check_class(configs["vae"], config_checks.VAES)
        config_checks.check_vae(configs["vae"], channels, is_sdxl=len(encoders) == 2)
    widths = [config_checks.check_text_encoder(configs[name]) for name in encoders if name in configs]
    if "unet" in configs and len(widths) == len(encoders):
        _check_texts(named, model, configs, widths)
    if "unet" in configs and "vae" in configs:
        blocks = configs["vae"]["block_out_channels"] or configs["vae"]["decoder_block_out_channels"] or ()
        check_image_sizes(model, 2 ** (len(blocks) - 1) if blocks else 1, configs["unet"].config)


def check_image_sizes(model: ModelConfig, pixels_per_latent: int, unet: Mapping[str, Any]) -> None:
    """Raises ValueError for sizes of images that the UNet cannot halve as often as it does."""
    step = pixels_per_latent * 2 ** (len(unet.get("block_out_channels") or (0, 0, 0, 0)) - 1)
    named = {f"model.image_sizes[{index}]": size for index, size in enumerate(model.image_sizes)}
    for field, size in (named or {"model.image_size": model.image_size}).items():
        pixels = size if isinstance(size, list) else [size]
        if any(side % step for side in pixels):
            near = [max(1, round(side / step)) * step for side in pixels]
            remedy = near if isinstance(size, list) else near[0]
            raise ValueError(f"{field}={size} must divide by {step}; try {remedy}")


def _check_texts(named: str, model: ModelConfig, configs: Mapping[str, PartConfig], widths: Sequence[int]) -> None:
    """Raises ValueError if the UNet was made for other text encoders."""
    # Compare the encodings of tokens.
    unet, width = configs["unet"], sum(widths)
    kind, wanted = unet["addition_embed_type"], unet.config.get("cross_attention_dim", 1280)
    if (isinstance(wanted, int) and wanted != width) or (kind == "text_time") != (len(widths) == 2):
        made_for = "two text encoders" if kind else "one text encoder"
        raise ValueError(
            f"model.path={model.path} has a UNet for {made_for} of width {wanted}, and {named} has"
            f" {len(widths)} of width {width}; give the pipeline that the UNet was made for"
        )

    # Compare SDXL's pooled encoding and sizes.
    if kind == "text_time":
        pooled, time = (
            configs["text_encoder_2"].count("projection_dim", 512),
            unet.count("addition_time_embed_dim", None),
        )
        if unet["projection_class_embeddings_input_dim"] != 6 * time + pooled:
            reason = f"six sizes of {time} and a pooled encoding of {pooled} make {6 * time + pooled}"
            raise unet.refuse("projection_class_embeddings_input_dim", reason, "give a UNet and encoders of one model")
