"""rlcm-fast plan on the shipped model: tables, JSON, mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from planners import planner_of

from rlcm_fast.cli.main import main
from rlcm_fast.planner import seconds

CONFIG = ["--config", "configs/shapes/compressibility.yaml", "--update.micro_batch_size", "32"]


@pytest.fixture(autouse=True)
def _traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "Planner", lambda architecture, *more: planner_of(architecture.name, *more))


def test_the_plan_of_all_gpus_is_a_table(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG]) == 0
    printed = capsys.readouterr().out
    for words in (
        "micro-batches of 64 (rollout) and 32 (update)",
        "copy of the start model (KL)",
        "a guess",
        "fitted to an h200 without torch.compile, 9% off at most there",
        "hours: all 96 iterations",
    ):
        assert words in printed
    assert "rtx3060" in printed
    assert "h200" in printed


def test_a_plan_takes_rewards_whose_models_are_not_run_yet(capsys: pytest.CaptureFixture[str]):
    rewards = "[{name: aesthetic}, {name: distribution_parity, arguments: {classifier: skin_tone}}]"
    assert main(["plan", *CONFIG, "--gpu", "4090", "--rewards", rewards]) == 0
    assert "it fits: " in capsys.readouterr().out


def test_the_plan_of_one_gpu_has_a_verdict(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG, "--gpu", "4090"]) == 0
    printed = capsys.readouterr().out
    assert "it fits: " in printed
    assert "largest micro-batches that fit: 64 (rollout), 192 (update)" in printed
    assert main(["plan", *CONFIG, "--gpu", "3060", "--reward-gib", "10.7"]) == 0
    printed = capsys.readouterr().out
    assert "it does not fit: " in printed
    assert "it would fit with --" in printed


CROWDED = ["--reward-gib", "10.4"]  # leaves an rtx3060 1.6 GiB
GRAPHS = ["--engine.graphs=auto", "--engine.dtype=pure_bf16", "--optimizer.name=adamw_8bit"]


def test_a_plan_uses_graphs_where_they_have_room_and_says_where_they_have_not(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG, *GRAPHS, "--gpu", "4090"]) == 0
    printed = capsys.readouterr().out
    assert "kept by graphs" in printed and "engine.graphs=auto" not in printed
    assert main(["plan", *CONFIG, *GRAPHS, "--gpu", "4090", "--engine.memory_gib=1.25"]) == 0
    printed = capsys.readouterr().out
    assert "kept by graphs" not in printed
    assert "engine.graphs=auto: no graphs, with which these micro-batches would take 1." in printed
    assert main(["plan", *CONFIG, *GRAPHS]) == 0
    assert "GiB on each GPU" in capsys.readouterr().out
    assert main(["plan", *CONFIG, *GRAPHS, *CROWDED]) == 0
    assert "GiB on each GPU" not in capsys.readouterr().out  # they differ by graphs


@pytest.mark.slow
def test_the_plans_of_the_page_are_the_planners(capsys: pytest.CaptureFixture[str]):
    page = Path("docs/planner.md").read_text(encoding="utf-8").replace("\\\n", "")
    block = re.search(r"^    rlcm-fast (plan .*)", page, re.MULTILINE)
    assert block is not None
    arguments = block[1].split()
    assert main(arguments) == 0
    assert main([*arguments[: arguments.index("--gpu")], "--update.micro_batch_size=8"]) == 0
    one, table = capsys.readouterr().out.split("largest micro-batches that fit")
    words = " ".join(page.split())
    assert " ".join(one.split()) in words
    assert " ".join(table[table.index("GPU  ") :].split()) in words


AUTO = ["--update.micro_batch_size", "auto", "--rollout.micro_batch_size", "auto", "--rollout.decode_batch_size=auto"]


def test_a_plan_chooses_what_a_config_leaves_to_it(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG, *AUTO, "--gpu", "4090"]) == 0
    printed = capsys.readouterr().out
    assert "micro-batches of 64 (rollout) and 64 (update)" in printed and "hours of the whole run: " in printed
    assert main(["plan", *CONFIG, *AUTO, "--gpu", "4090", "--engine.memory_gib=1.4", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["peak_bytes"].values()) <= 1.4 * 2**30 * 0.97
    assert report["gpus"]["rtx4090"]["micro_batch_size"] < 64


@pytest.mark.parametrize(("room", "moves"), [("1.15", True), ("24", False)])
def test_a_plan_says_whether_idle_parts_stay(capsys: pytest.CaptureFixture[str], room: str, moves: bool):
    options = ["--engine.offload_idle=auto", "--gpu=4090", f"--engine.memory_gib={room}"]
    assert main(["plan", *CONFIG, *AUTO, *options]) == 0
    printed = capsys.readouterr().out
    assert ("  engine.offload_idle=auto: text encoders and VAE stay on the GPU" in printed) != moves
    assert ("  engine.offload_idle=auto: text encoders and VAE move to the GPU and back; if they" in printed) == moves


def test_a_table_of_sizes_left_open_has_no_bytes_of_one_of_them(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG, *AUTO, *CROWDED]) == 0
    printed = capsys.readouterr().out
    assert "micro-batches as each GPU has room for" in printed and "weights of the UNet" not in printed
    assert main(["plan", *CONFIG, *AUTO, *CROWDED, "--json"]) == 2
    assert "give --gpu NAME" in capsys.readouterr().err


def test_json_has_bytes_and_seconds_alone(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *CONFIG, "--gpu=h100", "--json", "--processes", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"]["weights"] == pytest.approx(4 * 4.0e6, rel=0.05)
    assert report["peak_bytes"]["update"] > report["bytes"]["activations"]
    assert report["gpus"]["h100"]["fits"] is True
    assert report["gpus"]["h100"]["seconds_are"] == "an estimate by the efficiency of an h200, not measured"
    assert 0 < report["gpus"]["h100"]["seconds"]["update"] < report["gpus"]["h100"]["seconds"]["iteration"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "gtx1080"], "gpu=gtx1080 is not in the table; give one of rtx3060"),
        (["--model.path", "some/one"], "model.path=some/one is not known without a network; give a folder, or one of "),
        (["--engine.zero_stag", "1"], "--engine.zero_stag is no field of the config; did you mean --engine.zero_stage"),
        (["--gup", "h100"], "--gup is no option of this command, and no field of the config; did you mean --gpu?"),
        (["--config", "no.yaml"], "config=no.yaml is not a file"),
        (["--update.micro_batch_size", "7"], "update.micro_batch_size=7 does not divide"),
        (["--image-size", "100"], "image-size=100 must divide by 64; try 128"),
        (["--processes", "3"], "does not divide by the 3 processes"),
    ],
)
def test_a_mistake_is_one_line_with_the_way_out(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_other_commands_take_no_overrides(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        main(["sample", "--model", "x", "--prompt", "y", "--engine.dtype", "bf16"])
    assert exit_info.value.code == 2
    assert "unrecognized arguments: --engine.dtype bf16" in capsys.readouterr().err
