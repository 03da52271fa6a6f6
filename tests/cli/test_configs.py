"""rlcm-fast configs, and commands that take one of its names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from planners import planner_of

from rlcm_fast.cli.main import main
from rlcm_fast.planner import seconds
from rlcm_fast.train import main as train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_configs_are_listed_a_line_each_with_what_they_are_for(capsys: pytest.CaptureFixture[str]):
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(list(ROOT.glob("configs/*/*.yaml")))
    words = "The main job: smaller JPEG files of pictures that stay pictures, in minutes on two CPU cores."
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("shapes/compressibility ")] == [words]
    assert len({line.index(line.split(maxsplit=1)[1]) for line in lines}) == 1, "in two columns"


def test_a_plan_takes_the_name_of_a_config_from_any_folder(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(seconds, "Planner", lambda architecture, *more: planner_of(architecture.name, *more))
    assert main(["plan", "--config", "shapes/compressibility", "--gpu", "4090"]) == 0
    assert "it fits: " in capsys.readouterr().out


def test_an_unknown_name_is_one_line_of_a_plan_and_of_training(capsys: pytest.CaptureFixture[str]):
    for run in (lambda argv: main(["plan", *argv]), train):
        assert run(["--config", "shapes/compresibility"]) == 2
        printed = capsys.readouterr()
        assert printed.err.startswith("error: config=shapes/compresibility is not a file; ")
        assert "did you mean shapes/compressibility or " in printed.err
        assert printed.err.endswith("`rlcm-fast configs` lists them\n")
        assert (printed.out, printed.err.count("\n")) == ("", 1)


def test_a_dry_run_by_name_finds_the_prompts_and_prints_a_config_that_reads_back(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    assert train(["--config", "rlcm/alignment", "--config", "rlcm/lora_16_32", "--dry_run"]) == 0
    printed = capsys.readouterr().out
    assert f"source: {ROOT}/configs/rlcm/activities.txt" in printed
    assert "# samples_per_iteration: 120\n" in printed
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "printed.yaml").write_text(printed)
    assert train(["--config", "again/printed.yaml", "--dry_run"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("extra", [["--seed", "1"], ["more"]])
def test_a_list_takes_no_arguments(extra: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["configs", *extra])
    assert exit_info.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error():
    command = [sys.executable, "-m", "rlcm_fast.cli.main", "configs"]
    read, write = os.pipe()
    os.close(read)  # as head does after its last line
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")
