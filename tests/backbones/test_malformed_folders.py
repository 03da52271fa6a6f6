"""Folders of models that are damaged or of another kind: each ends in one line, before weights load where that can be.

One kind a line. A change gets the folder of a Stable Diffusion model, an SDXL model or a latent consistency model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlcm_fast.backbones.assembly import folder_configs
from rlcm_fast.backbones.model_checks import check_model
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.config import ModelConfig, PolicyConfig
from rlcm_fast.policies.build import build_schedule

Change = Callable[[Path], object]
UNET, VAE = "unet/config.json", "vae/config.json"
TEXT, TOKENIZER, SCHEDULER = (
    "text_encoder/config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
)
INDEX = "model_index.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
UNET_FILE, VAE_FILE, TEXT_FILE = f"unet/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"
NAN = float("nan")


def config(file: str, **fields: Any) -> Change:
    """Sets fields of a JSON file."""

    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def without(file: str, field: str) -> Change:
    """Takes a field out of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        del content[field]
        (folder / file).write_text(json.dumps(content))

    return change


def cut(file: str, num_bytes: int) -> Change:
    """Keeps the first bytes of a file; a negative number leaves out the last ones."""
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:num_bytes])


def holds(file: str, text: str) -> Change:
    return lambda folder: (folder / file).write_text(text)


def removed(name: str) -> Change:
    def change(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def weights(file: str, edit: Callable[[dict[str, Any]], None]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file)

    return change


def drop_half(tensors: dict[str, Any]) -> None:
    for name in sorted(tensors)[::2]:
        del tensors[name]


def put(number: float) -> Callable[[dict[str, Any]], None]:
    def edit(tensors: dict[str, Any]) -> None:
        tensors[max(tensors)].view(-1)[-1] = number

    return edit


def misshape(tensors: dict[str, Any]) -> None:
    name = max(tensors)
    tensors[name] = torch.zeros(3, 5)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"

BEFORE_WEIGHTS: list[tuple[Change, str]] = [
    (cut(INDEX, 40), f"{INDEX} is damaged"),
    (holds(INDEX, ""), f"{INDEX} is empty"),
    (holds(INDEX, "[]"), f"{INDEX} holds a list and no JSON object"),
    (holds(INDEX, "{}"), "has no UNet2DConditionModel"),
    (config(INDEX, unet=["diffusers", "UNet2DModel"]), "has no UNet2DConditionModel"),
    (config(INDEX, unet=["diffusers"]), r"says unet=\['diffusers'\], which names no library and class"),
    (config(INDEX, unet=[None, None]), "has no UNet2DConditionModel"),
    (config(INDEX, unet=[1, 2]), "names no library and class"),
    (config(INDEX, vae=[None, None]), "has no vae; give a text-to-image folder"),
    (
        config(INDEX, vae=["diffusers", "ConsistencyDecoderVAE"]),
        "its vae is a ConsistencyDecoderVAE; give a model with",
    ),
    (config(INDEX, vae=["diffusers", "VQModel"]), "its vae is a VQModel; give a model with"),
    (config(INDEX, text_encoder=[None, None]), "has no text_encoder"),
    (config(INDEX, text_encoder=["transformers", "T5EncoderModel"]), "its text_encoder is a T5EncoderModel; give"),
    (config(INDEX, text_encoder=["transformers", "CLIPTextModelWithProjection"]), "give a model with CLIPTextModel"),
    (config(INDEX, text_encoder_2=["transformers", "CLIPTextModelWithProjection"]), "has no tokenizer_2"),
    (config(INDEX, tokenizer=[None, None]), "has no tokenizer"),
    (config(INDEX, tokenizer=["transformers", "T5Tokenizer"]), "its tokenizer is a T5Tokenizer; give"),
    (config(INDEX, scheduler=[None, None]), "has no scheduler"),
    (removed("unet"), "it has no unet/config.json; copy or download"),
    (removed("vae"), "it has no vae/config.json; copy"),
    (removed("text_encoder"), "it has no text_encoder/config.json; copy"),
    (removed("tokenizer"), "it has no folder tokenizer, which model_index.json names; copy"),
    (removed("scheduler"), "it has no scheduler/scheduler_config.json; copy"),
    (removed("tokenizer/tokenizer.json"), "tokenizer has no tokenizer.json, nor vocab.json and merges.txt"),
    (removed(UNET_FILE), r"unet has no weights \(no .safetensors file\)"),
    (removed(VAE_FILE), "vae has no weights"),
    (removed(TEXT_FILE), "text_encoder has no weights"),
    (cut(UNET, 100), "unet/config.json is damaged"),
    (cut(VAE, 100), "vae/config.json is damaged"),
    (cut(TEXT, 100), "text_encoder/config.json is damaged"),
    (cut(SCHEDULER, 100), "scheduler/scheduler_config.json is damaged"),
    (cut(TOKENIZER, 100), "tokenizer/tokenizer_config.json is damaged"),
    (cut("tokenizer/tokenizer.json", 100), "tokenizer/tokenizer.json is damaged"),
    (holds(UNET, ""), "unet/config.json is empty"),
    (holds(UNET, "null"), "unet/config.json holds a NoneType and no JSON object"),
    (holds(UNET, "[" * 100_000), "unet/config.json is damaged"),
    (lambda folder: (folder / UNET).write_bytes(b"\xff\xfe{}"), "unet/config.json is damaged .*utf-8"),
    (cut(UNET_FILE, -1), "unet/diffusion_pytorch_model.safetensors is cut off: it has .* of .* bytes; copy"),
    (cut(UNET_FILE, 1000), "is no safetensors file, or is cut off"),
    (cut(UNET_FILE, 3), "of 3 bytes is no safetensors file"),
    (cut(UNET_FILE, 0), "of 0 bytes is no safetensors file"),
    (cut(VAE_FILE, -1), "vae/diffusion_pytorch_model.safetensors is cut off"),
    (cut(TEXT_FILE, -1), "text_encoder/model.safetensors is cut off"),
    (holds(UNET_FILE, "<html>404</html>" * 9), "is no safetensors file, or is cut off"),
    (holds(UNET_FILE, LFS), "is a pointer of Git LFS and no weights; run git lfs pull"),
    (holds(TEXT_FILE, LFS), "is a pointer of Git LFS and no weights; run git lfs pull"),
    (holds(f"unet/{WEIGHTS}.index.json", "{}"), "has no weight_map"),
    (
        holds(
            f"unet/{WEIGHTS}.index.json", '{"weight_map": {"a": "diffusion_pytorch_model-00001-of-00002.safetensors"}}'
        ),
        "unet lacks diffusion_pytorch_model-00001-of-00002.safetensors, which its index names",
    ),
    (config(UNET, _class_name="UNet2DModel"), "its unet/config.json belongs to class UNet2DModel; give"),
    (config(UNET, _class_name="Foo"), "its unet/config.json belongs to class Foo; give"),
    (config(UNET, in_channels=9), "in_channels=9: and out_channels=4: an inpainting or editing model; give"),
    (config(UNET, in_channels=8), "in_channels=8: .*an inpainting or editing model; give"),
    (config(UNET, in_channels=17), "in_channels=17: .*an inpainting or editing model; give"),
    (config(UNET, out_channels=8), "an inpainting or editing model; give"),
    (config(UNET, in_channels=16, out_channels=16), "latent_channels=4: the UNet has in_channels=16; give"),
    (config(UNET, in_channels="4"), "in_channels=4: no whole number from 1 on"),
    (config(UNET, sample_size=None), "sample_size=None: no size of latents; set --model.image_size"),
    (config(UNET, sample_size=0), "sample_size=0: no size of latents"),
    (config(UNET, sample_size=8.5), "sample_size=8.5: no size of latents"),
    (config(UNET, sample_size="8"), "sample_size=8: no size of latents"),
    (config(UNET, sample_size=[8]), "no size of latents"),
    (config(UNET, sample_size=[8, None]), "no size of latents"),
    (config(UNET, sample_size=[8, 8, 8]), "no size of latents"),
    (config(UNET, class_embed_type="timestep"), "class_embed_type=timestep: its UNet wants class labels; give"),
    (config(UNET, num_class_embeds=10), "num_class_embeds=10: its UNet wants class labels; give"),
    (config(UNET, encoder_hid_dim=16), "encoder_hid_dim=16: its UNet wants other encodings"),
    (
        config(UNET, encoder_hid_dim_type="image_proj"),
        "encoder_hid_dim_type=image_proj: its UNet wants other encodings",
    ),
    (config(UNET, addition_embed_type="image"), "addition_embed_type=image: an input that is not known here; give"),
    (
        config(UNET, cross_attention_dim=16),
        "a UNet for one text encoder of width 16, and model.path=.* has 1 of width 24",
    ),
    (config(UNET, addition_embed_type="text_time"), "a UNet for two text encoders of width 24"),
    (config(UNET, time_cond_proj_dim=0), "time_cond_proj_dim=0: no whole number from 1 on"),
    (config(UNET, time_cond_proj_dim="x"), "time_cond_proj_dim=x: no whole number from 1 on"),
    (config(VAE, _class_name="VQModel"), "its vae/config.json belongs to class VQModel; give"),
    (config(VAE, latent_channels=16), "latent_channels=16: the UNet has in_channels=4; give"),
    (config(VAE, latent_channels=-4), "latent_channels=-4: no whole number"),
    (config(VAE, out_channels=4), "out_channels=4: images have 3 channels"),
    (config(VAE, in_channels=1), "in_channels=1: images have 3 channels"),
    (config(VAE, scaling_factor=0), "scaling_factor=0: latents cannot be divided by it; write 0.18215"),
    (config(VAE, scaling_factor=0.0), "scaling_factor=0.0: latents cannot be divided by it"),
    (config(VAE, scaling_factor=-1.0), "scaling_factor=-1.0: latents cannot be divided by it"),
    (config(VAE, scaling_factor=NAN), "scaling_factor=nan: latents cannot be divided by it"),
    (config(VAE, scaling_factor=float("inf")), "scaling_factor=inf: latents cannot be divided by it"),
    (config(VAE, scaling_factor=None), "scaling_factor=None: latents cannot be divided by it"),
    (config(VAE, scaling_factor="0.18"), "scaling_factor=0.18: latents cannot be divided by it"),
    (config(VAE, scaling_factor=True), "scaling_factor=True: latents cannot be divided by it"),
    (config(VAE, shift_factor=0.1), "shift_factor=0.1: the pipelines of Stable Diffusion and SDXL ignore it; set it"),
    (
        config(VAE, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        "only the pipeline of SDXL reads it; .*set it to null",
    ),
    (config(TEXT, num_hidden_layers=0), "num_hidden_layers=0: no whole number from 1 on"),
    (config(TEXT, hidden_size=25), "hidden_size=25: no multiple of num_attention_heads"),
    (config(TEXT, hidden_size="24"), "hidden_size=24: no whole number"),
    (config(TEXT, num_attention_heads=0), "num_attention_heads=0: no whole number"),
    (config(TEXT, vocab_size=-1), "vocab_size=-1: no whole number"),
    (config(TOKENIZER, model_max_length=77), "model_max_length=77: the text encoder takes 3 to 32 tokens; write 32"),
    (config(TOKENIZER, model_max_length=2), "model_max_length=2: the text encoder takes 3 to 32 tokens"),
    (config(TOKENIZER, model_max_length="x"), "model_max_length=x: the text encoder takes 3 to 32 tokens"),
    (without(TOKENIZER, "model_max_length"), "model_max_length=None: the text encoder takes 3 to 32 tokens; write 32"),
    (config(TOKENIZER, padding_side="left"), "padding_side=left: texts here are padded behind their end; write right"),
]

BEFORE_WEIGHTS_XL: list[tuple[Change, str]] = [
    (removed("text_encoder_2"), "it has no text_encoder_2/config.json; copy"),
    (removed("tokenizer_2"), "it has no folder tokenizer_2"),
    (
        config(INDEX, text_encoder=[None, None], tokenizer=[None, None]),
        "has no text_encoder; give .*a refiner is not one",
    ),
    (config(VAE, latents_mean=[0.0] * 4), "latents_mean=.*: it needs the other one of latents_mean and latents_std"),
    (config(VAE, latents_std=[1.0] * 4), "latents_std=.*: it needs the other one"),
    (config(VAE, latents_mean=[0.0] * 3, latents_std=[1.0] * 4), "latents_mean=.*: no list of 4 numbers"),
    (config(VAE, latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0]), "a standard deviation is above 0"),
    (config(VAE, latents_mean=[NAN] * 4, latents_std=[1.0] * 4), "latents_mean=.*: no list of 4 numbers"),
    (config(UNET, projection_class_embeddings_input_dim=52), "=52: six sizes of 8 and a pooled encoding of 12 make 60"),
    (config(UNET, addition_time_embed_dim=None), "addition_time_embed_dim=None: no whole number"),
    (config(UNET, addition_embed_type=None), "a UNet for one text encoder of width 40, and .* has 2 of width 40"),
    (config("text_encoder_2/config.json", projection_dim=16), "a pooled encoding of 16 make 64; give"),
    (config(VAE, latents_mean=0.0, latents_std=1.0), "latents_mean=0.0: no list of 4 numbers"),
]

OF_THE_SCHEDULER: list[tuple[Change, str]] = [
    (config(SCHEDULER, beta_start=NAN), "scheduler config beta_start=nan is not between 0 and 1; correct"),
    (config(SCHEDULER, beta_end=NAN), "beta_end=nan is not between 0 and 1"),
    (config(SCHEDULER, beta_end=1.5), "beta_end=1.5 is not between 0 and 1"),
    (config(SCHEDULER, beta_start=0.0), "beta_start=0.0 is not between 0 and 1"),
    (config(SCHEDULER, beta_start=-0.1), "beta_start=-0.1 is not between 0 and 1|could not be loaded"),
    (config(SCHEDULER, beta_start="x"), "beta_start=x is not between 0 and 1|could not be loaded"),
    (config(SCHEDULER, beta_schedule="foo"), "could not be loaded: .*foo is not implemented"),
    (
        config(SCHEDULER, num_train_timesteps=0),
        "num_train_timesteps=0 is no whole number from 1 on|could not be loaded",
    ),
    (config(SCHEDULER, num_train_timesteps=-1), "num_train_timesteps=-1 is no whole number|could not be loaded"),
    (config(SCHEDULER, num_train_timesteps=None), "could not be loaded|num_train_timesteps"),
    (config(SCHEDULER, original_inference_steps=0), "original_inference_steps=0 is no whole number from 1 on; correct"),
    (config(SCHEDULER, original_inference_steps=-5), "original_inference_steps=-5 is no whole number"),
    (
        config(SCHEDULER, original_inference_steps=2000),
        "original_inference_steps=2000 is above num_train_timesteps=1000",
    ),
    (config(SCHEDULER, original_inference_steps="50"), "original_inference_steps=50 is no whole number"),
    (config(SCHEDULER, timestep_scaling=NAN), "timestep_scaling=nan is no number above 0"),
    (config(SCHEDULER, timestep_scaling=0), "timestep_scaling=0 is no number above 0"),
    (config(SCHEDULER, prediction_type="foo"), "prediction_type='foo'; use epsilon, v_prediction or sample"),
    (config(SCHEDULER, prediction_type=None), "prediction_type=None; use epsilon"),
    (config(SCHEDULER, trained_betas=[0.1, 0.2]), "lists 2 betas, and num_train_timesteps=1000"),
    (config(SCHEDULER, trained_betas=[NAN] * 1000), "has betas that are not between 0 and 1"),
    (config(SCHEDULER, trained_betas=[]), "trained_betas=.. is no list of numbers"),
    (config(SCHEDULER, clip_sample=True), "clip_sample=True: it clips x_0"),
    (config(SCHEDULER, thresholding=True), "thresholding=True: it clips x_0"),
    (config(SCHEDULER, rescale_betas_zero_snr=True, original_inference_steps=50), "pure noise"),
    (config(INDEX, scheduler=["diffusers", "FooScheduler"]), "its scheduler is a FooScheduler, which the library does"),
    (config(INDEX, scheduler=["diffusers", "UNet2DModel"]), "could not be loaded|does not know the model's scheduler"),
]

WHILE_LOADING: list[tuple[Change, str]] = [
    (
        config(INDEX, _class_name="FooPipeline"),
        "its model_index.json belongs to class FooPipeline, which is no pipeline",
    ),
    (without(INDEX, "_class_name"), "belongs to class None, which is no pipeline"),
    (holds("tokenizer/tokenizer.json", "{}"), "could not be loaded: .*; copy or download the folder anew"),
    (config(TOKENIZER, pad_token=None), "its tokenizer has no pad_token; correct tokenizer_config.json|could not be"),
    (weights(UNET_FILE, drop_half), "its unet lacks 104 of 208 weights, such as conv_in.bias; copy or download"),
    (weights(VAE_FILE, drop_half), "its vae lacks 62 of 124 weights, such as decoder.conv_in.bias; copy"),
    (weights(TEXT_FILE, drop_half), "its text_encoder lacks .* of 36 weights, such as embeddings.position_embedding"),
    (weights(UNET_FILE, put(NAN)), "its unet has NaN or infinite numbers in 1 weights, such as up_blocks.*; copy"),
    (weights(VAE_FILE, put(NAN)), "its vae has NaN or infinite numbers in 1 weights, such as quant_conv.weight; copy"),
    (weights(TEXT_FILE, put(float("inf"))), "its text_encoder has NaN or infinite numbers in 1 weights"),
    (weights(UNET_FILE, misshape), "its unet .*; copy or download"),
    (weights(VAE_FILE, misshape), "its vae .*; copy or download"),
    (weights(TEXT_FILE, misshape), "its text_encoder .*; copy or download"),
    (
        config(TEXT, vocab_size=10),
        "its tokenizer has the token 73, and its text encoder 10 tokens|text_encoder .*; copy",
    ),
    (config(TEXT, vocab_size=100), "its text_encoder .*; copy"),
    (config(TEXT, hidden_act="foo"), r"its text_encoder does not fit its config \(KeyError"),
    (config(UNET, block_out_channels=[]), "its unet does not fit its config"),
    (config(UNET, block_out_channels="x"), "its unet does not fit its config"),
    (config(UNET, block_out_channels=[8, 32]), "its unet .*; copy"),
    (config(UNET, down_block_types=["Foo", "DownBlock2D"]), "its unet does not fit its config .*Foo"),
    (config(UNET, norm_num_groups=7), "its unet does not fit its config"),
    (config(UNET, act_fn="foo"), "its unet does not fit its config"),
    (config(VAE, block_out_channels=[8]), "its vae .*; copy"),
    (config(VAE, up_block_types=["Foo", "Foo"]), "its vae does not fit its config .*Foo"),
]


def changed(folder: str, tmp_path: Path, change: Change) -> ModelConfig:
    copied = Path(shutil.copytree(folder, tmp_path / "model"))
    change(copied)
    return ModelConfig(str(copied))


def schedule_of(model: ModelConfig) -> None:
    """Makes the schedule of a folder, as a run does before it loads weights."""
    configs = folder_configs(model)
    assert configs is not None
    build_schedule(PolicyConfig(), *configs)


def is_one_line(error: pytest.ExceptionInfo[ValueError]) -> bool:
    return "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(("change", "message"), BEFORE_WEIGHTS, ids=[message[:40] for _, message in BEFORE_WEIGHTS])
def test_what_configs_and_headers_tell_is_refused_before_weights_load(
    change: Change, message: str, tiny_sd_folder: str, tmp_path: Path
):
    model = changed(tiny_sd_folder, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        check_model(model)
    assert is_one_line(error) and str(error.value).startswith(f"model.path={model.path}")


@pytest.mark.parametrize(
    ("change", "message"), BEFORE_WEIGHTS_XL, ids=[message[:40] for _, message in BEFORE_WEIGHTS_XL]
)
def test_what_configs_of_sdxl_tell_is_refused_before_weights_load(
    change: Change, message: str, tiny_sdxl_folder: str, tmp_path: Path
):
    with pytest.raises(ValueError, match=message) as error:
        check_model(changed(tiny_sdxl_folder, tmp_path, change))
    assert is_one_line(error)


@pytest.mark.parametrize(("change", "message"), OF_THE_SCHEDULER, ids=[message[:40] for _, message in OF_THE_SCHEDULER])
def test_a_scheduler_that_no_policy_can_follow_is_refused_before_weights_load(
    change: Change, message: str, tiny_lcm_folder: str, tmp_path: Path
):
    model = changed(tiny_lcm_folder, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        schedule_of(model)
    assert is_one_line(error)


@pytest.mark.parametrize(("change", "message"), WHILE_LOADING, ids=[message[:40] for _, message in WHILE_LOADING])
def test_what_only_loading_shows_ends_in_one_line(change: Change, message: str, tiny_sd_folder: str, tmp_path: Path):
    model = changed(tiny_sd_folder, tmp_path, change)
    with pytest.raises(ValueError, match=message) as error:
        Backbone.load(model, torch.device("cpu"), torch.float32, "ddim")
    assert is_one_line(error) and str(error.value).startswith(f"model.path={model.path}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no safetensors file, or is damaged; download it again"),
        (b"<html>" * 9, "is no safetensors file, or is damaged; download it again"),
        (b"\2\0\0\0\0\0\0\0[]", "is no safetensors file, or is damaged"),
        (b'\7\0\0\0\0\0\0\0{"a":1}', "is no safetensors file, or is damaged"),
        (b'\x20\0\0\0\0\0\0\0{"a": {"data_offsets": [0, 64]}}', "is cut off: it has 40 of 104 bytes; download"),
    ],
)
def test_a_checkpoint_in_one_file_that_is_damaged_is_refused_before_weights_load(
    content: bytes, message: str, tmp_path: Path
):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.path=.*model.safetensors {message}"):
        check_model(ModelConfig(str(tmp_path / "model.safetensors")))


def test_a_file_that_is_there_is_not_looked_for_on_a_hub(
    tiny_unet_folder: str, tiny_sd_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("notes").write_text("x" * 99)
    for model in (ModelConfig("notes"), ModelConfig(tiny_sd_folder, vae="notes")):
        with pytest.raises(ValueError, match="=notes is no safetensors file"):
            check_model(model)
    with pytest.raises(ValueError, match="model.base=notes is a file and no diffusers folder; give a folder, or a hub"):
        check_model(ModelConfig(tiny_unet_folder, base="notes"))
    with pytest.raises(ValueError, match="model.lora=notes is not a LoRA"):
        check_model(ModelConfig(tiny_sd_folder, lora="notes"))


@pytest.mark.parametrize("field", ["path", "base", "vae", "lora"])
def test_a_hub_that_cannot_be_reached_is_not_called_a_wrong_name(
    field: str, tiny_sd_folder: str, tiny_unet_folder: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    own = tiny_unet_folder if field == "base" else tiny_sd_folder
    model = ModelConfig(**{"path": own, field: "nobody/nothing"})
    message = f"model.{field}=nobody/nothing could not be loaded: it is not in the hub's cache, and the hub cannot be"
    with pytest.raises(ValueError, match=f"{message} reached; check the network"):
        Backbone.load(model, torch.device("cpu"), torch.float32, "ddim")


def test_a_size_of_ones_own_replaces_one_that_the_folder_lacks(tiny_sd_folder: str, tmp_path: Path):
    model = changed(tiny_sd_folder, tmp_path, config(UNET, sample_size=None))
    sized = ModelConfig(model.path, image_size=16)
    assert Backbone.load(sized, torch.device("cpu"), torch.float32, "ddim").image_size == (16, 16)
