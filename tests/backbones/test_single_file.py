"""Checkpoints in one file: what goes in comes out, in our own reading and in diffusers', and nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_open_clip_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.assembly import assemble, load_pipeline
from rlcm_fast.backbones.file_kinds import LAYOUTS, kind_of
from rlcm_fast.backbones.loading import resolve_model, variant_of
from rlcm_fast.backbones.original_names import openclip_name, original_vae_name
from rlcm_fast.backbones.single_file import tokenizers, whole_name
from rlcm_fast.backbones.single_file_writing import save_single_file, unet_tensors
from rlcm_fast.config import ModelConfig
from rlcm_fast.planner.architecture import load_architecture

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
KINDS = ("sd", "sd2", "sdxl", "lcm")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small pipeline of each family."""
    root = tmp_path_factory.mktemp("folders")
    sd2 = StableDiffusionPipeline.from_pretrained(tiny_pipelines.save_sd(root / "sd"), safety_checker=None)
    torch.manual_seed(8)
    config = {**sd2.unet.config, "use_linear_projection": True}
    sd2.register_modules(unet=UNet2DConditionModel.from_config(config))
    sd2.save_pretrained(root / "sd2")
    tiny_pipelines.save_sdxl(root / "sdxl", pooled=tiny_pipelines.WIDTH_2)  # as wide as the encoder, as SDXL's is
    tiny_pipelines.save_lcm(root / "lcm")
    return {kind: str(root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def files(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same as single files."""
    root, found = tmp_path_factory.mktemp("files"), {}
    for kind, folder in folders.items():
        found[kind] = root / f"{kind}.safetensors"
        save_single_file(load(folder), found[kind], torch.float32, 4.0)
    return found


def load(folder: str) -> Any:
    return load_pipeline(folder, None, torch.float32, "model")


def weights(pipeline: Any) -> dict[str, Tensor]:
    found = {}
    for part in PARTS:
        if pipeline.components.get(part) is not None:
            found |= {f"{part}.{name}": weight for name, weight in pipeline.components[part].state_dict().items()}
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name, weight in one.items() if not torch.equal(weight, other[name])] == []


def drawn(pipeline: Any, guidance_scale: float = 4.0) -> Tensor:
    pipeline.scheduler = LCMScheduler(**tiny_pipelines.BETAS)
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": guidance_scale, "output_type": "pt"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(5), **settings).images


@pytest.mark.parametrize("kind", KINDS)
def test_a_written_file_is_read_with_equal_tensors(kind: str, folders: dict[str, str], files: dict[str, Path]):
    read = assemble(ModelConfig(str(files[kind]), base=folders[kind]), torch.float32, kind="ddim")
    start = load(folders[kind])
    assert_equal(weights(read), weights(start))
    for name in ("sample_size", "time_cond_proj_dim", "cross_attention_dim"):
        assert read.unet.config[name] == start.unet.config[name]
    assert type(read.scheduler) is type(start.scheduler)
    # Sums over equal weights at other addresses may run in another order: 2.4e-7 between images on an AMD EPYC.
    torch.testing.assert_close(drawn(read), drawn(start), rtol=0, atol=1e-6)


def test_a_file_that_names_its_scheduler_keeps_it_unless_the_policy_names_a_kind(
    folders: dict[str, str], files: dict[str, Path]
):
    model = ModelConfig(str(files["sd"]), base=folders["sd"])
    found = [type(assemble(model, torch.float32, kind).scheduler).__name__ for kind in ("auto", "consistency", "tcd")]
    assert found == [type(load(folders["sd"]).scheduler).__name__, "LCMScheduler", "TCDScheduler"]


@pytest.mark.parametrize("kind", ["sd", "sd2", "sdxl"])
def test_diffusers_reads_a_written_file_with_equal_tensors(kind: str, folders: dict[str, str], files: dict[str, Path]):
    cls: Any = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    stock = cls.from_single_file(files[kind], config=folders[kind], local_files_only=True)
    assert_equal(weights(stock), weights(load(folders[kind])))


def test_other_tools_draw_a_consistency_model_at_the_guidance_of_the_file(
    folders: dict[str, str], files: dict[str, Path], tmp_path: Path
):
    plain = folders["sd"]  # the same configs without a guidance input, which is what other tools know
    stock = StableDiffusionPipeline.from_single_file(files["lcm"], config=plain, local_files_only=True)
    assert stock.unet.config.time_cond_proj_dim is None
    expected = drawn(load(folders["lcm"]), 4.0)
    torch.testing.assert_close(drawn(stock, 1.0), expected, atol=1e-5, rtol=0)
    assert (drawn(load(folders["lcm"]), 1.0) - expected).abs().max() > 1e-4, "the guidance has an effect"


def test_half_precision_and_metadata(folders: dict[str, str], tmp_path: Path):
    file = tmp_path / "half.safetensors"
    save_single_file(load(folders["sdxl"]), file, torch.float16, 1.0, **{"modelspec.title": "tiny"})
    with safe_open(file, framework="pt") as content:
        metadata = content.metadata()
        assert {content.get_tensor(name).dtype for name in content.keys()} == {torch.float16}  # noqa: SIM118
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert (metadata["modelspec.resolution"], metadata["modelspec.title"]) == ("16x16", "tiny")
    data = file.read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == f"0x{hashlib.sha256(tensors).hexdigest()}"
    read = assemble(ModelConfig(str(file), base=folders["sdxl"]), torch.float32, kind="ddim")
    expected = {name: weight.half().float() for name, weight in weights(load(folders["sdxl"])).items()}
    assert_equal(weights(read), expected)


def test_what_a_file_lacks_comes_from_the_base_and_another_vae_goes_first(
    folders: dict[str, str], files: dict[str, Path], tmp_path: Path
):
    whole = load_file(files["sd"])
    alone = tmp_path / "unet.safetensors"
    prefix = "model.diffusion_model."
    save_file({name.removeprefix(prefix): weight for name, weight in whole.items() if name.startswith(prefix)}, alone)
    vae = tmp_path / "vae.safetensors"
    start = "first_stage_model."
    save_file({name.removeprefix(start): w + 1 for name, w in whole.items() if name.startswith(start)}, vae)
    read = assemble(ModelConfig(str(alone), base=folders["sd"], vae=str(vae)), torch.float32, kind="consistency")
    assert isinstance(read.scheduler, LCMScheduler)
    expected = {name: weight + name.startswith("vae.") for name, weight in weights(load(folders["sd"])).items()}
    assert_equal(weights(read), expected)
    folder = assemble(ModelConfig(folders["sd"], vae=folders["sdxl"]), torch.float32, kind="ddim")
    assert_equal(weights(folder), weights(load(folders["sd"])))  # the small VAEs are the same


def test_a_unet_in_a_file_may_have_the_names_of_diffusers(folders: dict[str, str], tmp_path: Path):
    file = Path(
        shutil.copy(Path(folders["sdxl"]) / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "u.safetensors")
    )
    read = assemble(ModelConfig(str(file), base=folders["sdxl"]), torch.float32, kind="ddim")
    assert_equal(weights(read), weights(load(folders["sdxl"])))


def test_the_oldest_files_leave_out_a_level_and_have_more_than_is_read(
    folders: dict[str, str], files: dict[str, Path], tmp_path: Path
):
    old = {name.replace(".text_model.", "."): weight for name, weight in load_file(files["sd"]).items()}
    old |= {
        "model_ema.decay": torch.ones(1),
        "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None],
    }
    save_file(old, tmp_path / "old.safetensors")
    read = assemble(ModelConfig(str(tmp_path / "old.safetensors"), base=folders["sd"]), torch.float32, "ddim")
    assert_equal(weights(read), weights(load(folders["sd"])))


def test_a_file_says_what_its_unet_predicts_or_the_user_does(
    folders: dict[str, str], files: dict[str, Path], tmp_path: Path
):
    def prediction(file: Path, **more: Any) -> str:
        model = ModelConfig(str(file), base=folders["sd"], **more)
        return assemble(model, torch.float32, "ddim").scheduler.config["prediction_type"]

    assert prediction(files["sd"]) == "epsilon"
    assert prediction(files["sd"], prediction="v_prediction") == "v_prediction"
    tensors = load_file(files["sd"])
    save_file({**tensors, "v_pred": torch.zeros(0)}, tmp_path / "v.safetensors")
    assert prediction(tmp_path / "v.safetensors") == "v_prediction"
    save_file(tensors, tmp_path / "m.safetensors", {"modelspec.prediction_type": "v"})
    assert prediction(tmp_path / "m.safetensors") == "v_prediction"
    with pytest.raises(ValueError, match="model.prediction=epsilon is for a checkpoint in one file"):
        resolve_model(ModelConfig(folders["sd"], prediction="epsilon"))


def test_marks_of_other_noise_are_followed_or_refused(folders: dict[str, str], files: dict[str, Path], tmp_path: Path):
    tensors, file = load_file(files["sd"]), tmp_path / "marked.safetensors"
    model = ModelConfig(str(file), base=folders["sd"])
    save_file({**tensors, "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, file)
    assert assemble(model, torch.float32, "ddim").scheduler.config["rescale_betas_zero_snr"] is True
    save_file({**tensors, "edm_mean": torch.zeros(4)}, file)
    with pytest.raises(ValueError, match=r"was trained with EDM's noise \(edm_mean\), which is not known here; give"):
        assemble(model, torch.float32, "ddim")


def test_a_single_file_has_no_place_for_statistics_of_latents(folders: dict[str, str], tmp_path: Path):
    pipeline = load(folders["sdxl"])
    pipeline.vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    with pytest.raises(ValueError, match="has no place for latents_mean and latents_std .*; use --format diffusers"):
        save_single_file(pipeline, tmp_path / "model.safetensors", torch.float32, guidance_scale=1.0)


def sparse(path: Path, shapes: dict[str, list[int]]) -> Path:
    """A safetensors file with a header and a hole for its tensors, which takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(torch.tensor(shape).prod())
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + end)
    return path


def kept(name: str) -> list[str]:
    return gzip.decompress((Path(__file__).parent / "names" / f"{name}.txt.gz").read_bytes()).decode().split()


FAMILIES = {
    "sd15": ("stable-diffusion-v1-5/stable-diffusion-v1-5", 768),
    "sd2": ("stabilityai/stable-diffusion-2-base", 1024),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", 2048),
}


def shapes_of(family: str, *parts: str) -> dict[str, list[int]]:
    first = {
        "model.diffusion_model.input_blocks.0.0.weight": [320, 4, 3, 3],
        "model.diffusion_model.time_embed.0.weight": [1280, 320],
    }
    place = "input_blocks.1.1" if family != "sdxl" else "input_blocks.4.1"
    name = f"model.diffusion_model.{place}.transformer_blocks.0.attn2.to_k.weight"
    return {**first, name: [320, FAMILIES[family][1]], **{part: [1] for part in parts}}


VAE, CLIP = "first_stage_model.encoder.conv_in.weight", "cond_stage_model.transformer.text_model.final_layer_norm.bias"


def test_the_family_is_told_by_the_header_and_what_is_missing_is_asked_for(tmp_path: Path):
    def found(*parts: str, family: str = "sd15", **model: Any) -> Any:
        return resolve_model(ModelConfig(str(sparse(tmp_path / "x.safetensors", shapes_of(family, *parts))), **model))

    assert found(VAE, CLIP).pipeline == str(LAYOUTS / "sd15")
    assert found(CLIP, vae="some/vae").vae == "some/vae"
    with pytest.raises(ValueError, match="model.path=.* holds no VAE; give one as model.vae"):
        found(CLIP)
    with pytest.raises(ValueError, match="holds no text_encoder; give the pipeline that has it as model.base, such as"):
        found(VAE)
    two = ("conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x")
    assert found(VAE, *two, family="sdxl").pipeline == str(LAYOUTS / "sdxl")
    with pytest.raises(ValueError, match="holds no text_encoder_2; give"):
        found(VAE, two[0], family="sdxl")
    with pytest.raises(ValueError, match="does not say what its UNet predicts; give --model.prediction v_prediction"):
        found(VAE, "cond_stage_model.model.ln_final.bias", family="sd2")
    assert found(VAE, "cond_stage_model.model.x", family="sd2", prediction="epsilon").kind.family == "sd2"


def test_what_is_no_checkpoint_is_refused_with_the_reason(tmp_path: Path):
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(ValueError, match="model.path=.*a.ckpt is a pickle, and reading one runs any code .*convert it"):
        resolve_model(ModelConfig(str(tmp_path / "a.ckpt")))
    (tmp_path / "b.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ValueError, match="b.safetensors is no safetensors file, or is damaged"):
        resolve_model(ModelConfig(str(tmp_path / "b.safetensors")))
    with pytest.raises(ValueError, match="c.safetensors does not exist; give a .safetensors file"):
        resolve_model(ModelConfig(str(tmp_path / "c.safetensors")))
    inpainting = {**shapes_of("sd15"), "model.diffusion_model.input_blocks.0.0.weight": [320, 9, 3, 3]}
    with pytest.raises(ValueError, match="has a UNet with 9 input channels"):
        resolve_model(ModelConfig(str(sparse(tmp_path / "d.safetensors", inpainting))))
    lora = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": [4, 4]}
    with pytest.raises(ValueError, match="is a LoRA; give it as model.loras, not a checkpoint"):
        resolve_model(ModelConfig(str(sparse(tmp_path / "e.safetensors", lora))))
    with pytest.raises(ValueError, match="holds no UNet of Stable Diffusion's kind .its first name is double_blocks"):
        resolve_model(ModelConfig(str(sparse(tmp_path / "f.safetensors", {"double_blocks.0": [1]}))))


def test_a_file_with_a_tensor_less_or_of_another_shape_is_named(
    folders: dict[str, str], files: dict[str, Path], tmp_path: Path
):
    tensors = load_file(files["sd"])
    name = "model.diffusion_model.middle_block.0.in_layers.2.bias"
    save_file({**tensors, name: torch.zeros(3)}, tmp_path / "shape.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "less.safetensors")
    for file, reason in (
        ("shape", r"its UNet has mid_block.resnets.0.conv1.bias of shape \[3\]"),
        ("less", "its UNet lacks 1 of"),
    ):
        with pytest.raises(ValueError, match=f"model.path=.* could not be loaded: {reason}.*; give the pipeline"):
            assemble(ModelConfig(str(tmp_path / f"{file}.safetensors"), base=folders["sd"]), torch.float32, "ddim")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_full_size_pipeline_is_built_from_the_configs_of_the_package(family: str):
    ours, published = load_architecture(str(LAYOUTS / family)), load_architecture(FAMILIES[family][0])
    for mine, theirs in (
        (ours.build_unet(), published.build_unet()),
        (ours.build_vae(), published.build_vae()),
        *zip(ours.build_text_encoders(), published.build_text_encoders(), strict=True),
    ):
        one, other = mine.state_dict(), theirs.state_dict()
        assert {name: weight.shape for name, weight in one.items()} == {n: w.shape for n, w in other.items()}


def test_the_names_of_a_full_size_vae_are_the_published_ones_and_diffusers_converts_them_back():
    vae = load_architecture(FAMILIES["sdxl"][0]).build_vae()
    weights_of = vae.state_dict()
    names = {original_vae_name(name, 4): weight for name, weight in weights_of.items()}
    assert len(names) == 248
    assert sorted(names) == kept("vae")
    back = convert_ldm_vae_checkpoint(
        {f"first_stage_model.{name}": weight for name, weight in names.items()}, vae.config
    )
    assert back.keys() == weights_of.keys()
    assert all(back[name].shape == weight.shape for name, weight in weights_of.items())


def test_the_names_of_full_size_text_encoders_are_the_published_ones_and_diffusers_converts_them_back():
    for family, number in (("sd2", 23 * 12 + 4), ("sdxl", 32 * 12 + 5)):
        encoder = load_architecture(FAMILIES[family][0]).build_text_encoders()[-1]
        weights_of = {whole_name(name): weight for name, weight in encoder.state_dict().items()}
        names = {}
        for name, weight in weights_of.items():
            spelt, third = openclip_name(name)
            names[spelt] = weight if third is None else torch.cat([weight] * 3)
        assert len(names) == number
        assert sorted(names) == kept(f"{family}_openclip")
        prefix = "conditioner.embedders.1.model."
        back = convert_open_clip_checkpoint(encoder, {prefix + name: weight for name, weight in names.items()}, prefix)
        assert {name: weight.shape for name, weight in back.items()} == {n: w.shape for n, w in weights_of.items()}
    first = load_architecture(FAMILIES["sd15"][0]).build_text_encoders()[0]
    assert sorted(whole_name(name) for name in first.state_dict()) == kept("clip_l")


def test_the_tokenizers_of_the_package_are_clips():
    first, second = tokenizers("sdxl")["tokenizer"], tokenizers("sdxl")["tokenizer_2"]
    assert len(first) == 49408
    assert first("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = [tokenizer("a", padding="max_length").input_ids[3:] for tokenizer in (first, second)]
    assert padded == [[49407] * 74, [0] * 74]


def test_a_folder_with_half_precision_files_only_is_read_as_that_variant(folders: dict[str, str], tmp_path: Path):
    load(folders["sd"]).to(torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    assert variant_of(str(tmp_path / "half"), None) == "fp16"
    assert variant_of(folders["sd"], None) is None
    read = assemble(ModelConfig(str(tmp_path / "half")), torch.float32, "ddim")
    assert_equal(weights(read), {name: w.half().float() for name, w in weights(load(folders["sd"])).items()})


def test_a_layer_without_an_original_name_is_refused():
    unet = tiny_pipelines.unet()
    unet.add_module("extra", torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="the original layout has no name for extra.weight; export --format diffusers"):
        unet_tensors(unet, 1.0)


def test_kind_of_reads_the_parts(files: dict[str, Path]):
    assert kind_of(files["sdxl"], "x").parts == {"unet", "vae", "text_encoder", "text_encoder_2"}
