"""LoRA files of other tools: every layout gives the same weights, at the strength that it was trained with."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.shared import tiny_pipelines
from rlcm_fast.backbones.adapters import add_adapters, save_adapters
from rlcm_fast.backbones.assembly import fuse_lora, load_pipeline
from rlcm_fast.backbones.loading import LORA_FILE, resolve_lora_path, resolve_model, split_hub_file
from rlcm_fast.backbones.lora_layouts import KOHYA_FILE, add_lora, kohya_name, read_lora
from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli.main import main as tool
from rlcm_fast.config import LoraConfig, LoraSource, ModelConfig, parse_config
from rlcm_fast.planner.architecture import load_architecture
from rlcm_fast.run_folder.fingerprint import flat
from rlcm_fast.run_folder.rules import changes
from rlcm_fast.train import main as train

RANK, ALPHA = 2, 3.0  # so that alpha / rank is neither 1 nor the rank


def adapters_of(unet: UNet2DConditionModel, targets: tuple[str, ...] = ("to_q", "to_out.0", "conv1")) -> None:
    """Adapters as if training had moved them."""
    add_adapters(unet, LoraConfig(RANK, ALPHA, list(targets)))
    generator = torch.Generator().manual_seed(7)
    for name, weight in unet.named_parameters():
        if ".lora_" in name:
            weight.data.normal_(std=0.3, generator=generator)


def save(folder: Path, is_sdxl: bool = False) -> tuple[dict[str, Tensor], Path]:
    """What the layers add to the weights, and the folder of the two files."""
    unet = tiny_pipelines.unet(is_sdxl=is_sdxl)
    adapters_of(unet)
    save_adapters(unet, unet.state_dict(), StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline, folder)
    before = tiny_pipelines.unet(is_sdxl=is_sdxl).state_dict()
    unet.fuse_lora()
    unet.unload_lora()
    return {name: weight - before[name] for name, weight in unet.state_dict().items()}, folder


def added_by(file: Path, is_sdxl: bool = False, scale: float = 1.0) -> dict[str, Tensor]:
    unet = tiny_pipelines.unet(is_sdxl=is_sdxl)
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    add_lora(read_lora(file, {"unet": unet}), {"unet": unet}, scale)
    return {name: weight - before[name] for name, weight in unet.state_dict().items()}


def assert_same(added: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    assert sum(bool(delta.abs().max() > 0.01) for delta in expected.values()) >= 6
    for name, delta in expected.items():
        torch.testing.assert_close(added[name], scale * delta, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_both_files_of_a_run_add_what_the_adapters_add_at_any_scale(is_sdxl: bool, tmp_path: Path):
    expected, folder = save(tmp_path, is_sdxl)
    for file in (LORA_FILE, KOHYA_FILE):
        assert_same(added_by(folder / file, is_sdxl), expected)
        assert_same(added_by(folder / file, is_sdxl, 0.5), expected, 0.5)


@pytest.mark.parametrize("is_sdxl", [False, True], ids=["sd", "sdxl"])
def test_diffusers_reads_the_kohya_file_at_the_same_strength(is_sdxl: bool, tmp_path: Path):
    expected, folder = save(tmp_path, is_sdxl)
    kind: Any = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    model = tiny_pipelines.save_sdxl(tmp_path / "m") if is_sdxl else tiny_pipelines.save_sd(tmp_path / "m")
    stock = kind.from_pretrained(model)
    stock.unet = tiny_pipelines.unet(is_sdxl=is_sdxl)
    stock.load_lora_weights(folder, weight_name=KOHYA_FILE)
    stock.fuse_lora()
    stock.unload_lora_weights()
    before = tiny_pipelines.unet(is_sdxl=is_sdxl).state_dict()
    assert_same({name: weight - before[name] for name, weight in stock.unet.state_dict().items()}, expected)


def test_the_kohya_file_has_the_alpha_of_training_and_says_its_family(tmp_path: Path):
    save(tmp_path)
    with safe_open(tmp_path / KOHYA_FILE, framework="pt") as file:
        alphas = [file.get_tensor(name).item() for name in file.keys() if name.endswith(".alpha")]  # noqa: SIM118
        metadata = file.metadata()
    assert set(alphas) == {ALPHA}
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("2", "3")
    assert metadata["ss_base_model_version"] == "sd_v1"


def test_a_fused_lora_is_bitwise_what_diffusers_and_peft_fuse(tiny_sd_folder: str, tmp_path: Path):
    lora = tiny_pipelines.save_lora(tmp_path, tiny_pipelines.unet())
    ours, stock = (load_pipeline(tiny_sd_folder, None, torch.float32, "model") for _ in range(2))
    note = fuse_lora(ours, resolve_lora_path(lora), "model.lora=x")
    assert note == "model.lora=x: 32 of 32 layers matched (32 of unet)"
    stock.load_lora_weights(lora)
    stock.fuse_lora()
    stock.unload_lora_weights()
    expected = stock.unet.state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in ours.unet.state_dict().items())


def renamed(file: Path, rename: Callable[[str], str], out: Path) -> Path:
    """A copy of a file of PEFT's with other names and without metadata."""
    out.parent.mkdir(exist_ok=True)
    save_file({rename(name): tensor for name, tensor in load_file(file).items()}, out)
    return out


def old_attention(name: str) -> str:
    """Returns the names that diffusers 0.12 to 0.18 gave."""
    name = name.replace(".lora_A.weight", "_lora.down.weight").replace(".lora_B.weight", "_lora.up.weight")
    return (
        name.replace(".attn1.", ".attn1.processor.")
        .replace(".attn2.", ".attn2.processor.")
        .replace("to_out.0", "to_out")
    )


def test_older_spellings_are_read_with_alpha_equal_to_rank(tmp_path: Path):
    unet = tiny_pipelines.unet()
    add_adapters(unet, LoraConfig(RANK, RANK, ["to_q", "to_out.0"]))
    for name, weight in unet.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    save_adapters(unet, unet.state_dict(), StableDiffusionPipeline, tmp_path)
    peft, expected = tmp_path / LORA_FILE, added_by(tmp_path / KOHYA_FILE)
    old = renamed(peft, old_attention, tmp_path / "old" / "a.safetensors")
    assert_same(added_by(old), expected)
    assert_same(added_by(renamed(peft, lambda name: old_attention(name).removeprefix("unet."), old)), expected)
    dotted = renamed(peft, lambda name: name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"), old)
    assert_same(added_by(dotted), expected)


def test_a_folder_of_peft_has_its_alpha_in_its_config(tmp_path: Path):
    expected, folder = save(tmp_path)
    file = renamed(
        folder / LORA_FILE, lambda name: name.replace("unet.", "base_model.model."), tmp_path / "peft" / "a.safetensors"
    )
    (file.parent / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    assert_same(added_by(file), expected)
    config = {"r": RANK, "lora_alpha": 100.0, "alpha_pattern": {"to_q": ALPHA, "to_out.0": ALPHA, "conv1": ALPHA}}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    assert_same(added_by(file), expected)
    config = {"r": RANK, "lora_alpha": ALPHA / RANK**0.5, "use_rslora": True}
    (file.parent / "adapter_config.json").write_text(json.dumps(config))
    assert_same(added_by(file), expected)


def test_layers_of_the_text_encoders_are_added_too_and_the_rest_is_counted(tiny_sdxl_folder: str, tmp_path: Path):
    generator = torch.Generator().manual_seed(1)

    def layer(name: str, inputs: int, outputs: int) -> dict[str, Tensor]:
        down = torch.randn(RANK, inputs, generator=generator)
        up = torch.randn(outputs, RANK, generator=generator)
        return {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}

    first, second = tiny_pipelines.WIDTH, tiny_pipelines.WIDTH_2
    tensors = {
        **layer("lora_te1_text_model_encoder_layers_1_mlp_fc1", first, 32),
        **layer("lora_te2_text_model_encoder_layers_0_self_attn_q_proj", second, second),
        **layer("lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_k", 8, 8),
        **layer("lora_unet_input_blocks_9_1_proj_in", 8, 8),
    }
    save_file(tensors, tmp_path / "kohya.safetensors")
    pipeline = load_pipeline(tiny_sdxl_folder, None, torch.float32, "model")
    before = pipeline.text_encoder_2.state_dict()["text_model.encoder.layers.0.self_attn.q_proj.weight"].clone()
    note = fuse_lora(pipeline, str(tmp_path / "kohya.safetensors"), "lora=k", 0.5)
    assert note == (
        "lora=k: 3 of 4 layers matched (1 of text_encoder, 1 of text_encoder_2, 1 of unet); 1 unmatched, such as "
        "lora_unet_input_blocks_9_1_proj_in"
    )
    after = pipeline.text_encoder_2.state_dict()["text_model.encoder.layers.0.self_attn.q_proj.weight"]
    name = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    delta = 0.5 * ALPHA / RANK * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    torch.testing.assert_close(after - before, delta, atol=1e-6, rtol=1e-5)


def test_a_run_and_a_drawing_say_once_how_many_layers_of_a_lora_match(
    tiny_sd_folder: str, one_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    # Write a LoRA half of whose layers this model has, then train and draw with it.
    file = Path(tiny_pipelines.save_lora(tmp_path / "lora", tiny_pipelines.unet())) / LORA_FILE
    tensors = load_file(file)
    halves = {
        f"{name}.".replace("blocks.0.", "blocks.7." if index % 4 > 1 else "blocks.0."): tensor
        for index, (name, tensor) in enumerate(sorted(tensors.items()))
    }
    save_file({name.removesuffix("."): tensor for name, tensor in halves.items()}, file)
    settings = {"num_iterations": 1, "model.lora": file, "policy.guidance_scale": 1.5}
    assert train(tiny_runs.arguments(tiny_sd_folder, tmp_path / "run", settings)) == 0
    of_run = capsys.readouterr().err
    drawn = ["--model", tiny_sd_folder, "--lora", str(file), "--prompt", "a", "--num-images", "1", "--num-steps", "1"]
    assert tool(["sample", *drawn, "--out", str(tmp_path / "a.png")]) == 0
    for said in (of_run, capsys.readouterr().err):
        (line,) = [line for line in said.splitlines() if "layers matched" in line]
        assert re.search(r"lora=.*: (\d+) of (\d+) layers matched \(\1 of unet\); \d+ unmatched, such as unet\.", line)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA"), ("oft_blocks", "OFT")],
)
def test_other_kinds_of_adapters_are_refused_by_name(name: str, kind: str, tiny_sd_folder: str, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file({f"lora_unet_down_blocks_0_attentions_0_proj_in.{name}": torch.zeros(2, 2)}, file)
    pipeline = load_pipeline(tiny_sd_folder, None, torch.float32, "model")
    with pytest.raises(ValueError, match=f"lora=x could not be loaded: it is {kind}, not a LoRA .*; give a LoRA that"):
        fuse_lora(pipeline, str(file), "lora=x")


def test_a_layer_that_does_not_fit_changes_no_weight(tmp_path: Path):
    _, folder = save(tmp_path)
    tensors = load_file(folder / KOHYA_FILE)
    last = [name for name in tensors if name.endswith("lora_up.weight")][-1]
    save_file({**tensors, last: torch.zeros(5, RANK)}, tmp_path / "wrong.safetensors")
    unet = tiny_pipelines.unet()
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    lora = read_lora(tmp_path / "wrong.safetensors", {"unet": unet})
    with pytest.raises(ValueError, match=r"unet\..*: its matrices .* do not fit a weight of shape"):
        add_lora(lora, {"unet": unet})
    assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())


def test_a_file_in_a_hub_repository_can_be_named():
    assert resolve_lora_path("ByteDance/Hyper-SD/a/b-lora.safetensors") == "ByteDance/Hyper-SD/a/b-lora.safetensors"
    assert split_hub_file("ByteDance/Hyper-SD/a/b-lora.safetensors") == ("ByteDance/Hyper-SD", "a/b-lora.safetensors")
    assert split_hub_file("latent-consistency/lcm-lora-sdv1-5") == ("latent-consistency/lcm-lora-sdv1-5", "")
    with pytest.raises(ValueError, match="is not a LoRA"):
        resolve_lora_path("./some/where/lora.safetensors")


FULL_SIZE = {"stable-diffusion-v1-5/stable-diffusion-v1-5": 128, "stabilityai/stable-diffusion-xl-base-1.0": 560}


@pytest.mark.parametrize(("model", "layers"), FULL_SIZE.items(), ids=["sd15", "sdxl"])
def test_a_lora_over_all_attention_of_a_full_size_unet_has_the_names_that_kohyas_scripts_write(model: str, layers: int):
    unet = load_architecture(model).build_unet()
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    names = [name for name, _ in unet.named_modules() if name.endswith(targets)]
    written = {kohya_name(name, unet.config) for name in names}
    assert len(written) == len(names) == layers
    assert written == expected_kohya_names(model)


def expected_kohya_names(model: str) -> set[str]:
    """From the published layouts: the blocks that have transformers, with their depth, and eight layers in each."""
    if "xl" in model:
        blocks = {f"input_blocks_{n}_1": 2 if n < 6 else 10 for n in (4, 5, 7, 8)}
        blocks |= {f"output_blocks_{n}_1": 10 if n < 3 else 2 for n in range(6)} | {"middle_block_1": 10}
    else:
        blocks = {f"down_blocks_{block}_attentions_{n}": 1 for block in range(3) for n in range(2)}
        blocks |= {f"up_blocks_{block}_attentions_{n}": 1 for block in (1, 2, 3) for n in range(3)}
        blocks |= {"mid_block_attentions_0": 1}
    found = set()
    for block, depth in blocks.items():
        for number in range(depth):
            for attention in ("attn1", "attn2"):
                place = f"lora_unet_{block}_transformer_blocks_{number}_{attention}"
                found |= {f"{place}_{layer}" for layer in ("to_q", "to_k", "to_v", "to_out_0")}
    return found


def test_several_loras_are_fused_each_with_its_scale_and_the_counts_are_said(tiny_sd_folder: str, tmp_path: Path):
    for name in ("a", "b"):
        save(tmp_path / name)
    sources = [LoraSource(str(tmp_path / "a"), 0.5), LoraSource(str(tmp_path / "b" / KOHYA_FILE), -0.25)]
    start = Backbone.load(ModelConfig(tiny_sd_folder), torch.device("cpu"), torch.float32, False)
    both = Backbone.load(ModelConfig(tiny_sd_folder, loras=sources), torch.device("cpu"), torch.float32, False)
    one = added_by(tmp_path / "a" / KOHYA_FILE)
    before = start.unet.state_dict()
    added = {name: weight - before[name] for name, weight in both.unet.state_dict().items()}
    assert_same(added, one, 0.25)
    assert both.notes == tuple(
        f"model.loras[{number}].path={source.path}: 24 of 24 layers matched (24 of unet)"
        for number, source in enumerate(sources)
    )
    with pytest.raises(ValueError, match=r"model.loras\[1\].path=/no/where is not a LoRA; give a folder"):
        resolve_model(ModelConfig(tiny_sd_folder, loras=[sources[0], LoraSource("/no/where")]))


def test_loras_are_a_list_in_a_config_and_its_order_and_scales_matter_for_a_resumed_run():
    entry = "[{path: a.safetensors, scale: 0.8}, {path: b/c}]"
    config = parse_config(["--model.loras", entry])
    assert config.model.loras == [LoraSource("a.safetensors", 0.8), LoraSource("b/c")]
    assert flat(config)["model.loras"] == [{"path": "a.safetensors", "scale": 0.8}, {"path": "b/c", "scale": 1.0}]
    other = parse_config(["--model.loras", entry.replace("0.8", "0.7")])
    changed = changes(*({"fields": flat(each)} for each in (config, other)))
    assert [(change.field, change.rule.kind) for change in changed] == [("model.loras", "refused")]
