"""README and pages: their code runs, their commands name options and files that exist, and each page keeps its form."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "rlcm_fast" / "shapes" / "README.md",
    *PAGES,
]
TEXTS = {document: document.read_text(encoding="utf-8") for document in DOCUMENTS}
MOST_BYTES_OF_THE_README, MOST_BYTES_OF_A_PAGE = 12_000, 16_384
MODULES = {
    "class Redness": "my_rewards",
    "class Contrast": "my_set_rewards",
    "class Judge": "my_judge",
    "class Scorer": "my_scorer",
}  # code block -> the file it is put into
UNDER = {"your_model_on_24gb.md": "configs/sd15_lcm/full_24gb_guarded.yaml"}  # page -> what its YAML is put on top of


class Block(NamedTuple):
    document: Path
    text: str


def blocks(language: str) -> list[Block]:
    found = []
    for document, text in TEXTS.items():
        found += [Block(document, block) for block in re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)]
    return found


def ids(found: list[Block]) -> list[str]:
    return [f"{block.document.name}-{number}" for number, block in enumerate(found)]


def commands(program: str) -> list[tuple[str, str]]:
    """(Document, what follows `program` to the end of the command) for every command that calls it."""
    found = []
    for document, text in TEXTS.items():
        found += [(document.name, rest) for rest in re.findall(rf"{program}((?:[^\n\\#`]|\\\n)*)", text)]
    return found


def options_of(command: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[\w.-]+", command))


@functools.cache
def training_options() -> set[str]:
    from rlcm_fast.config import build_parser

    return {option for action in build_parser()._actions for option in action.option_strings}


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on Python's path with the plug-ins that a reader of the pages writes; each page's by `put_modules`."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(ROOT)
    return tmp_path


def put_modules(document: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in blocks("python"):
        for mark, module in MODULES.items():
            if block.document == document and mark in block.text:
                (folder / f"{module}.py").write_text(block.text)
                monkeypatch.delitem(sys.modules, module, raising=False)


NOTEBOOK = [block for block in blocks("python") if block.document.name == "python.md"]
SINGLE = [block for block in blocks("python") if block not in NOTEBOOK]


@pytest.mark.parametrize("block", SINGLE, ids=ids(SINGLE))
def test_every_block_of_python_runs(block: Block):
    import torch

    from rlcm_fast.kernels.adamw import AdamW8bit

    scope: dict[str, Any] = {"AdamW8bit": AdamW8bit, "unet": torch.nn.Linear(2, 2)}
    exec(block.text, scope)  # noqa: S102


@pytest.mark.slow
@pytest.mark.telling
def test_the_page_for_notebooks_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In short: one iteration more than before of four images."""
    import rlcm_fast

    tune, calls = rlcm_fast.fine_tune, []

    def tune_shortly(model: Any, **settings: Any) -> rlcm_fast.Run:
        calls.append(settings)
        short = {"prompts__num_prompts": 2, "prompts__images_per_prompt": 2, "evaluation__num_images": 2}
        sizes = {"update__micro_batch_size": 6, "tracking__grid_every": 0, "tracking__tensorboard": False}
        return tune(model, **{**settings, **short, **sizes, "num_iterations": len(calls)})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rlcm_fast, "fine_tune", tune_shortly, raising=False)
    scope: dict[str, Any] = {}
    for block in NOTEBOOK:
        exec(block.text, scope)  # noqa: S102
    assert [len(scope[name].metrics) for name in ("run", "again", "more")] == [2, 3, 4]
    assert scope["image"].size == (64, 64)


@pytest.mark.parametrize("block", blocks("yaml"), ids=ids(blocks("yaml")))
def test_every_block_of_yaml_is_a_config_whose_rewards_can_be_built(
    block: Block, modules: Path, monkeypatch: pytest.MonkeyPatch
):
    from rlcm_fast.config import parse_config
    from rlcm_fast.config.checks import validate
    from rlcm_fast.rewards import build_rewards

    put_modules(block.document, modules, monkeypatch)
    file = modules / "my_config.yaml"
    file.write_text(block.text)
    under = ["--config", UNDER[block.document.name]] if block.document.name in UNDER else []
    config = parse_config([*under, "--config", str(file)])
    run = validate(config, 1)
    for task in run.tasks:
        assert build_rewards(task.rewards)
    build_rewards(config.evaluation.rewards)


@pytest.mark.parametrize("document", [d for d, text in TEXTS.items() if "class Redness" in text], ids=lambda d: d.name)
def test_the_reward_of_a_page_scores_red_above_green(document: Path, modules: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from rlcm_fast.rewards import build_reward, check_scores
    from rlcm_fast.trajectory import Prompt

    put_modules(document, modules, monkeypatch)
    arguments = {"strength": 2.0} if "strength: 2.0" in TEXTS[document] else {}
    reward = build_reward("my_rewards:Redness", arguments)
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0], images[1, 1] = 1.0, 1.0  # red, green
    prompts = [Prompt("a red circle"), Prompt("a green circle")]
    strength = arguments.get("strength", 1.0)
    scores = check_scores("my_rewards:Redness", reward(images, prompts), prompts, iteration=0)
    assert scores.tolist() == [strength, -strength / 2]


def test_the_set_reward_of_the_pages_is_told_by_its_group(modules: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from rlcm_fast.config import parse_config
    from rlcm_fast.rewards import build_rewards
    from rlcm_fast.trajectory import Prompt

    page = ROOT / "docs" / "rewards.md"
    put_modules(page, modules, monkeypatch)
    config = next(block.text for block in blocks("yaml") if block.document == page and "Contrast" in block.text)
    (modules / "my_config.yaml").write_text(config)
    rewards = build_rewards(parse_config(["--config", str(modules / "my_config.yaml")]).rewards)
    spread, _ = rewards.pop("my_set_rewards:Contrast")
    images = torch.tensor([0.0, 1.0, 0.5, 0.5]).repeat(4)[:, None, None, None].expand(16, 3, 8, 8)
    values = spread(images, [Prompt("a circle")] * 16)
    assert values[0] > 0 > values[2]  # without it the group is less spread out, or more
    (parity, weight) = rewards["distribution_parity"]
    assert (weight, parity(torch.full((16, 3, 64, 64), 0.5), [Prompt("a circle")] * 16).max()) == (16.0, 0.0)


def test_the_judge_of_the_page_names_the_images_it_fails_for(modules: Path, monkeypatch: pytest.MonkeyPatch):
    import torch

    from rlcm_fast.rewards import ImagesFailed, build_reward
    from rlcm_fast.trajectory import Prompt

    put_modules(ROOT / "docs" / "rewards.md", modules, monkeypatch)
    judge = build_reward("my_judge:Judge", {})
    with pytest.raises(ImagesFailed, match="image 0: write this .*; image 1: write this"):
        judge(torch.zeros(2, 3, 8, 8), [Prompt("a"), Prompt("b")])
    monkeypatch.setattr(judge, "ask", lambda image, text: 0.5)
    assert judge(torch.zeros(2, 3, 8, 8), [Prompt("a"), Prompt("b")]).tolist() == [0.5, 0.5]


def test_the_neural_reward_of_the_page_is_short_and_passes_every_check(
    modules: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from safetensors.torch import save_file
    from torch import nn

    from rlcm_fast.cli.main import main as command

    put_modules(ROOT / "docs" / "rewards.md", modules, monkeypatch)
    example = next(block.text for block in blocks("python") if "class Scorer" in block.text)
    assert len([line for line in example.splitlines() if line.strip()]) <= 25
    network = nn.Sequential(nn.Conv2d(3, 32, 8, 8), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1))
    save_file(network.state_dict(), modules / "scorer.safetensors")
    arguments = f"{{file: {modules / 'scorer.safetensors'}}}"
    assert command(["check-reward", "my_scorer:Scorer", "--arguments", arguments, "--size", "80"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "my_scorer:Scorer: it can be trained on"


def test_the_kernels_of_the_pages_run_in_another_trainer(capsys: pytest.CaptureFixture[str]):
    example = next(block.text for block in blocks("python") if "policy_loss" in block.text)
    scope: dict[str, Any] = {}
    exec(example, scope)  # noqa: S102
    assert scope["m"].grad.abs().sum() > 0
    assert "tensor(1" in capsys.readouterr().out


def test_every_option_of_a_training_command_is_a_field():
    found = commands(r"rlcm_fast/train\.py")
    assert len(found) > 20
    for document, command in found:
        assert options_of(command) <= training_options(), f"{document}: {command}"


@pytest.mark.parametrize("name", ["sample", "evaluate", "plan", "configs", "export"])
def test_every_option_of_a_command_is_one_of_its_own(name: str):
    from rlcm_fast.cli.main import build_parser

    subcommands = next(action for action in build_parser()._actions if isinstance(action.choices, dict))
    assert isinstance(subcommands.choices, dict)
    known = {option for action in subcommands.choices[name]._actions for option in action.option_strings}
    known |= training_options() if name == "plan" else set()
    found = commands(f"rlcm-fast {name}(?=[ `])")
    assert found
    for document, command in found:
        assert options_of(command) <= known, f"{document}: {command}"


def test_every_file_that_a_text_names_is_there():
    """Configs, scripts, modules, tests and results; `rlcm/compressibility` is a config by its name."""
    names = r"(?:configs|benchmarks|rlcm_fast|tests|docs)/[\w/]+\.(?:yaml|txt|py|csv|json|md|png)"
    for document, text in TEXTS.items():
        for name in re.findall(rf"(?<![\w/.]){names}", text):
            assert (ROOT / name).is_file(), f"{document.name}: {name}"
        for name in re.findall(
            r"`((?:shapes|rlcm|large_scale|sd15_lcm|sdxl_lcm|turbo|dmd2|hyper_sd|lightning|lcm_lora)/[a-z]\w+)`", text
        ):
            is_there = (ROOT / "configs" / f"{name}.yaml").is_file()
            assert is_there or name in ("shapes/lcm", "shapes/teacher"), f"{document.name}: {name}"


def test_every_link_and_picture_is_there():
    for document, text in TEXTS.items():
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            assert target.startswith("https://") or (document.parent / target).exists(), f"{document.name}: {target}"


def test_every_page_is_linked_from_the_readme():
    for page in PAGES:
        named = page.name.startswith("learning_study_")  # the study's first page has these
        text = TEXTS[ROOT / "docs" / "learning_study.md"] if named else TEXTS[ROOT / "README.md"]
        assert re.search(rf"\]\((docs/)?{page.name}\)", text), page.name


def test_the_readme_and_the_pages_are_short():
    assert len(TEXTS[ROOT / "README.md"].encode()) <= MOST_BYTES_OF_THE_README
    for page in PAGES:
        assert len(TEXTS[page].encode()) <= MOST_BYTES_OF_A_PAGE, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_begins_with_the_question_that_it_answers(page: Path):
    title, question, answer = TEXTS[page].split("\n\n")[:3]
    assert re.fullmatch(r"# \S[^\n]*", title)
    assert re.fullmatch(r"\*[A-Z][^*]*\?\*", question), "the question stands under the title, in italics"
    assert re.match(r"[\w`(\[*]", answer) and not answer.startswith(("- ", "* ")), "the answer, or its first part"


def test_prose_is_ascii_and_120_columns_wide():
    for document, text in TEXTS.items():
        assert text.isascii(), document.name
        for line in text.splitlines():
            is_prose = not line.startswith(("    ", "|", "!", "  ")) and "](" not in line
            assert len(line) <= 120 or not is_prose, f"{document.name}: {line}"


def test_every_key_that_a_run_logs_is_in_the_table():
    rooms = ("*.py", "stages/*.py", "algorithms/*.py", "engine/*.py", "planner/report.py")
    files = [file for room in rooms for file in sorted((ROOT / "rlcm_fast").glob(room))]
    source = "".join(file.read_text() for file in files)
    keys = set(re.findall(r'"((?:advantage|ratio|seconds|pretraining|memory)/\w+)"', source))
    assert len(keys) >= 10
    keys |= {"iteration", "queries", "lr", "clip_fraction", "approx_kl", "loss", "kl_to_start", "grad_norm"}
    keys |= {"skipped_transitions", "advantage/zero_variance_groups", "gradient/<task>/norm", "lost_updates"}
    keys |= {"reward/<name>/mean", "reward/<task>/<name>/mean", "gradient/<task>/<other>/cosine"}
    keys |= {"eval/<reward>/mean", "eval/<reward>/std", "eval/diversity", "images_per_second"}
    page = TEXTS[ROOT / "docs" / "runs.md"]
    table = "".join(line for line in page.splitlines() if line.startswith("| `"))
    for key in keys:
        assert f"`{key}`" in table, key
