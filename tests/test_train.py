"""The door: a dry run's plan, mistakes in one line before anything heavy is loaded, one process that speaks."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from rlcm_fast.config import parse_config
from rlcm_fast.door import is_worded_by_us
from rlcm_fast.train import main, set_process_environment

ROOT = Path(__file__).resolve().parent.parent


def door(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "rlcm_fast/train.py", *argv],
        cwd=ROOT,
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def _seconds_of_processes() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_door_prints_the_plan_of_a_dry_run_as_a_config_file(tiny_lcm_folder: str):
    done = door("--dry_run", "--model.path", tiny_lcm_folder, "--seed", "9", "--num_iterations", "5")
    assert done.returncode == 0, done.stderr
    assert "# total_queries: 320\n" in done.stdout
    printed = yaml.safe_load(done.stdout)
    assert (printed["seed"], printed["dry_run"]) == (9, False)


def test_the_door_answers_a_mistake_with_one_line_without_loading_torch():
    before = _seconds_of_processes()
    done = door("--update.clip_rage", "1")
    assert _seconds_of_processes() - before < 5  # of its processor: the machine may be busy with other tests
    assert done.returncode == 2
    assert done.stdout == ""
    expected = (
        "--update.clip_rage is no field of the config; did you mean --update.clip_range? --help lists every field"
    )
    assert done.stderr == f"error: {expected}\n"
    code = "import sys, rlcm_fast.config.checks, rlcm_fast.backbones.loading; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rewards", "[{name: jpeg_compresibility}]"], "rewards[0].name=jpeg_compresibility is not known; did you"),
        (["--prompts.source", "no.txt"], "prompts.source=no.txt"),
        (["--pretraining.weight", "1", "--pretraining.data", "no/*.tar"], "pretraining.data=no/*.tar matches no .tar"),
        (["--evaluation.prompts", "no.txt"], "evaluation.prompts=no.txt"),
        (["--model.lora", "no.safetensors"], "model.lora=no.safetensors is not a LoRA; give a folder with"),
        (["--model.base", "shapes/teacher"], "model.base=shapes/teacher has no use"),
    ],
)
def test_the_door_finds_wrong_names_of_plugins_before_weights_load(
    argv: list[str], message: str, tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["--model.path", tiny_lcm_folder, *argv]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_dry_run_takes_rewards_whose_models_are_not_run_yet(tiny_lcm_folder: str, capsys: pytest.CaptureFixture[str]):
    rewards = "[{name: aesthetic}, {name: distribution_parity, arguments: {classifier: skin_tone}, group_size: 16}]"
    evaluated = "[{name: image_reward}, {name: vlm_alignment}, {name: object_detection}]"
    options = ["--dry_run", "--rewards", rewards, "--evaluation.rewards", evaluated]
    assert main(["--model.path", tiny_lcm_folder, *options]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["rewards"][1]["group_size"] == 16


DATASET = "hf:owner/name?column=prompt"


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The datasets that were opened, which would be a network."""
    paths: list[str] = []

    def load(path: str, *_: object, **__: object) -> None:
        paths.append(path)
        raise OSError("no network")

    monkeypatch.setattr("datasets.load_dataset", load)
    monkeypatch.setattr("datasets.load_dataset_builder", load)
    return paths


def test_a_dry_run_checks_the_form_of_a_dataset_and_opens_none(opened: list[str], capsys: pytest.CaptureFixture[str]):
    settings = ["--dry_run", "--pretraining.weight=1", "--pretraining.data=hf:owner/pairs?image=jpg&text=caption"]
    assert main([*settings, "--prompts.source", DATASET, "--evaluation.prompts", DATASET]) == 0
    assert main([*settings, "--evaluation.prompts", f"{DATASET}&windows=3"]) == 2
    assert f"evaluation.prompts={DATASET}&windows=3: windows is no option" in capsys.readouterr().err
    assert opened == []


@pytest.mark.parametrize("field", ["rewards", "evaluation.rewards"])
def test_a_reward_whose_files_are_missing_stops_a_run_before_anything_is_looked_up(
    field: str, opened: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    prompts = ["--prompts.source", DATASET, "--evaluation.prompts", DATASET, "--model.path", "owner/not-there"]
    assert main([*prompts, f"--{field}", "[{name: pickscore}]"]) == 2
    assert capsys.readouterr().err == (
        f"error: {field}[0].name=pickscore: model=yuvalkirstain/PickScore_v1 is not in the hub's cache, and "
        "HF_HUB_OFFLINE is set; it comes from the Hugging Face hub (yuvalkirstain/PickScore_v1), 3.9 GB, licence MIT "
        '(its code); run "hf download yuvalkirstain/PickScore_v1 config.json model.safetensors '
        "model.safetensors.index.json tokenizer.json vocab.json merges.txt tokenizer_config.json "
        'special_tokens_map.json --revision main" where there is a network, or give a folder\n'
    )
    assert opened == []
    assert main(prompts) == 2  # rewards that run: now the dataset is opened, still before weights load
    assert f"error: prompts.source={DATASET} cannot be streamed: no network" in capsys.readouterr().err
    assert opened == ["owner/name"]


@pytest.mark.usefixtures("opened")
def test_a_reward_that_downloads_says_so_before(capsys: pytest.CaptureFixture[str], monkeypatch, tmp_path: Path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    main(["--prompts.source", DATASET, "--model.path", "owner/not-there", "--rewards", "[{name: pickscore}]"])
    first = "rewards[0].name=pickscore downloads yuvalkirstain/PickScore_v1, 3.9 GB, licence MIT (its code)\n"
    assert capsys.readouterr().err.startswith(first)


def test_a_plugin_that_is_not_there_is_one_line_from_a_process_of_its_own():
    done = door("--prompts.source", "no.txt")
    assert done.returncode == 2
    assert "prompts.source=no.txt" in done.stderr
    assert done.stderr.count("\n") == 1


def test_one_process_of_several_speaks(tiny_lcm_folder: str):
    second = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for argv in (["--help"], ["--seed", "x"]):
        done = door(*argv, **second)
        assert (done.stdout, done.stderr) == ("", "")


def test_the_first_process_of_another_machine_says_what_is_missing_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    first_there = {"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in first_there.items():
        monkeypatch.setenv(name, value)
    assert main(["--prompts.source", "no.txt", "--update.micro_batch_size", "12"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: prompts.source=no.txt") and said.endswith("(rank 8)\n")
    assert said.count("\n") == 1


def test_runs_that_begin_together_are_given_no_port_to_meet_at(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is undone
        monkeypatch.delenv(name)
    assert set_process_environment() == (0, 1)
    assert os.environ["MASTER_PORT"] == "0"  # of torch's choice, once it listens


def test_only_our_own_errors_are_shown_without_a_traceback():
    for raise_it, ours in ((lambda: parse_config(["--sed"]), True), (lambda: int("x"), False)):
        with pytest.raises(ValueError) as error:
            raise_it()
        assert is_worded_by_us(error.value) == ours
