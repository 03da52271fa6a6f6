"""The papers' recipes at full size: checked and planned without a network, and run with small random models."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
import tiny_captions
import tiny_detectors
import tiny_rewards
import tiny_runs

from rlcm_fast.backbones.pipeline import Backbone
from rlcm_fast.cli.main import main as command
from rlcm_fast.config import parse_config
from rlcm_fast.config.batches import with_numbers
from rlcm_fast.config.checks import validate
from rlcm_fast.config.resolved import resolve
from rlcm_fast.prompts import load_prompts, prompts_for_images
from rlcm_fast.rewards.groups import side_by_side
from rlcm_fast.train import main
from rlcm_fast.trainer import Trainer

KINDS = ("dmd2", "hyper_sd", "lcm_lora", "lightning", "turbo")  # they run in test_few_step_recipes.py
RLCM = ("compressibility", "incompressibility", "aesthetic", "alignment")
LARGE_SCALE = ("preference", "composition", "fairness", "joint")
RECIPES = [*(f"rlcm/{name}" for name in RLCM), *(f"large_scale/{name}" for name in LARGE_SCALE)]
FEW_STEP = sorted(f"{kind}/{file.stem}" for kind in KINDS for file in Path(f"configs/{kind}").glob("*.yaml"))
ADAPTERS = {name: "lora_8_8" if name == "aesthetic" else "lora_16_32" for name in RLCM}
DOWNLOADS = {
    "rlcm/aesthetic": "rewards[0].name=aesthetic: model=openai/clip-vit-large-patch14 is not in the hub's cache",
    "rlcm/alignment": "rewards[0].name=vlm_alignment: scorer=microsoft/deberta-xlarge-mnli is not in the hub's cache",
    "large_scale/preference": "rewards[0].name=image_reward: model=THUDM/ImageReward is not in the hub's cache",
    "large_scale/composition": (
        "rewards[0].name=object_detection: model=google/owlv2-base-patch16-ensemble is not in the hub's cache"
    ),
    "large_scale/joint": "tasks[0].rewards[0].name=image_reward: model=THUDM/ImageReward is not in the hub's cache",
}
SMALL = {
    "rlcm": ["--evaluation.num_images=8"],
    "large_scale": [
        "--policy.num_steps=7",
        "--pretraining.batch_size=16",
        "--pretraining.workers=0",
        "--pretraining.micro_batch_size=16",
        "--update.micro_batch_size=16",
        "--evaluation.num_images=16",
    ],
}
NUM_PROMPTS = {"rlcm/alignment": 20, "large_scale/fairness": 1, "large_scale/joint": 48}  # of others 16


def with_adapters(name: str) -> list[str]:
    return ["--config", f"configs/rlcm/{name}.yaml", "--config", f"configs/rlcm/{ADAPTERS[name]}.yaml"]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("this would look for weights or data on a network")

    monkeypatch.setattr("datasets.load_dataset", refuse)
    monkeypatch.setattr("datasets.load_dataset_builder", refuse)
    monkeypatch.setattr(Backbone, "load", refuse)


@pytest.mark.parametrize("recipe", [*RECIPES, *FEW_STEP])
@pytest.mark.usefixtures("no_network")
def test_a_dry_run_of_a_recipe_passes_without_a_network(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main(["--config", f"configs/{recipe}.yaml", "--dry_run", "true"]) == 0
    assert "# total_queries: " in capsys.readouterr().out


@pytest.mark.parametrize("recipe", DOWNLOADS)
@pytest.mark.usefixtures("no_network", "one_process")
def test_offline_a_recipe_whose_reward_is_not_on_the_machine_says_so_in_one_line(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert main(["--config", f"configs/{recipe}.yaml", "--run_dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {DOWNLOADS[recipe]}") and said.count("\n") == 1


@pytest.mark.parametrize("name", LARGE_SCALE)
def test_a_large_recipe_is_good_for_every_power_of_two_up_to_the_papers_128_processes(name: str):
    config = parse_config(["--config", f"configs/large_scale/{name}.yaml"])
    for power in range(8):
        validate(config, 2**power)


@pytest.mark.parametrize("name", RLCM)
def test_adapters_in_a_second_file_change_only_what_they_are_about(name: str):
    whole, adapted = parse_config(["--config", f"configs/rlcm/{name}.yaml"]), parse_config(with_adapters(name))
    validate(adapted, 3 if name == "alignment" else 4)  # the paper's numbers of GPUs
    changed = {field for field in vars(whole) if getattr(whole, field) != getattr(adapted, field)}
    assert changed == {"lora", "optimizer", "engine"}
    assert (adapted.lora.rank, adapted.optimizer.lr, adapted.optimizer.final_lr_fraction) == (
        8 if name == "aesthetic" else 16,
        1e-4,
        0.667,
    )


@pytest.mark.parametrize("recipe", ["large_scale/fairness", "large_scale/joint"])
def test_fairness_is_evaluated_as_it_is_trained_on_groups_of_one_prompt_and_on_others(recipe: str):
    config = parse_config(["--config", f"configs/{recipe}.yaml"])
    task = resolve(with_numbers(config, 1), 1).tasks[-1]
    size = task.rewards[0].group_size
    assert size == task.images_per_prompt
    evaluation = config.evaluation
    prompts = prompts_for_images(load_prompts(task.evaluation, "prompts"), evaluation.num_images, evaluation.seed)
    texts = [prompts[place].text for place in side_by_side(prompts)]
    groups = [set(texts[first : first + size]) for first in range(0, len(texts), size)]
    assert {len(group) for group in groups} == {1}
    assert not set(texts) & {prompt.text for prompt in load_prompts(task.source, "prompts")}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*RECIPES, *FEW_STEP])
@pytest.mark.usefixtures("no_network")
def test_a_recipe_fits_on_the_gpus_it_is_for(recipe: str, capsys: pytest.CaptureFixture[str]):
    is_large = recipe.startswith("large_scale/")
    gpus = ["--gpu", "a100-80gb", "--processes", "128"] if is_large else ["--gpu", "rtx4090"]
    files = [with_adapters(recipe.removeprefix("rlcm/"))] if recipe.startswith("rlcm/") else []
    for config in (["--config", f"configs/{recipe}.yaml"], *files):
        assert command(["plan", *config, *gpus]) == 0
        assert "it fits: " in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.usefixtures("one_process")
def test_a_recipe_runs_with_a_small_model_of_its_layout(recipe: str, tmp_path: Path, request: pytest.FixtureRequest):
    line = smoke_run(recipe, tmp_path, request)
    assert all(math.isfinite(value) for value in line.values() if isinstance(value, float))
    assert line["grad_norm"] > 0
    assert line["advantage/abs_mean"] > 0  # grad_norm is of the loss on real pairs, too
    if recipe == "large_scale/joint":
        rewards = ("preference/image_reward", "composition/object_detection")
        assert {f"reward/{name}/mean" for name in (*rewards, "fairness/distribution_parity")} <= line.keys()
        assert line["queries"] == 2 * 3 * 16


@pytest.mark.slow
@pytest.mark.telling
@pytest.mark.parametrize("name", RLCM)
@pytest.mark.usefixtures("one_process")
def test_a_recipes_adapters_run_with_a_small_model(name: str, tmp_path: Path, request: pytest.FixtureRequest):
    adapters = ["--config", f"configs/rlcm/{ADAPTERS[name]}.yaml"]
    assert smoke_run(f"rlcm/{name}", tmp_path, request, adapters)["grad_norm"] > 0
    assert (tmp_path / "run" / "lora").is_dir()


def smoke_run(recipe: str, folder: Path, request: pytest.FixtureRequest, more: list[str] | None = None) -> dict:
    """The last of two iterations; everything is the recipe's but what needs a hub, a GPU, a compiler or much time."""
    family = recipe.partition("/")[0]
    model = request.getfixturevalue("tiny_lcm_folder" if family == "rlcm" else "tiny_sd_folder")
    shutil.copytree("configs", folder / "configs")  # the files that it names stay beside it
    config = folder / "configs" / f"{recipe}.yaml"
    config.write_text(_without_a_hub(config.read_text(), folder))
    sizes = ["--model.image_size=0", f"--prompts.num_prompts={NUM_PROMPTS.get(recipe, 16)}", *SMALL[family]]
    run = ["--num_iterations=2", f"--run_dir={folder / 'run'}", f"--model.path={model}", "--engine.compile=off"]
    Trainer(parse_config(["--config", str(config), *(more or []), *sizes, *run])).run()
    lines = [line for line in tiny_runs.metrics(folder / "run") if "loss" in line]
    assert [line["iteration"] for line in lines] == [0, 1]
    return lines[-1]


def _without_a_hub(text: str, folder: Path) -> str:
    """A recipe with small models of its rewards, or plug-ins, a list for its dataset, renders for its pairs."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a picture of {number} cats\n" for number in range(40)))
    text = re.sub(r"    arguments: \{captioner.*\n", "", text)
    for name, arguments in _small_rewards(folder).items():
        text = re.sub(rf"( *)- name: {name}\b.*", rf"\1- name: {name}\n\1  arguments: {arguments}", text)
    tones = tiny_detectors.save_vit(folder / "tones")
    text = text.replace("classifier: skin_tone", f"classifier: skin_tone, classifier_arguments: {{model: {tones}}}")
    text = text.replace("group_size: 16", "group_size: 8")  # of a task's 16 images: two groups to compare
    text = re.sub(r"hf:poloclub\S+", str(prompts), text)
    return re.sub(r"data: hf:laion\S+", "data: shapes:all", text)


def _small_rewards(folder: Path) -> dict[str, dict[str, str | int]]:
    """The arguments that give rewards small random models of the same layout."""
    (folder / "image_reward").mkdir()
    image_reward = tiny_rewards.save_image_reward(folder / "image_reward")
    clip = tiny_rewards.save_clip(folder / "clip")
    head = tiny_rewards.save_head(folder / "head.pth", tiny_rewards.WIDTH, "layers", (0, 2, 4, 6, 7))
    captioner, scorer = tiny_captions.save_llava(folder / "llava"), tiny_captions.save_deberta(folder / "deberta")
    return {
        "aesthetic": {"model": clip, "head": head},
        "vlm_alignment": {"captioner": captioner, "scorer": scorer, "layer": 2, "dtype": "fp32"},
        "image_reward": {"model": image_reward, "tokenizer": image_reward},
        "object_detection": {"model": tiny_detectors.save_owlv2(folder / "owlv2")},
    }
