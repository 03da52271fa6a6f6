"""bench_peers.py from its command line to its last line, on a model of 30,000 weights."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.shared.stage_clock import STAGES, StageClock
from benchmarks.speed import bench_peers

TEXTS = ("a red circle", "a blue square")
CONFIG = str(Path(bench_peers.__file__).parents[2] / "configs" / "shapes" / "compressibility_paper.yaml")


@pytest.fixture
def options(tiny_lcm_folder: str, tmp_path: Path) -> list[str]:
    """Two prompts of two images, three steps, two actions of ours; one repeat."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    settings = {
        "model.path": tiny_lcm_folder,
        "prompts.source": prompts,
        "evaluation.prompts": prompts,
        "evaluation.rewards": "[]",
        "prompts.num_prompts": 2,
        "prompts.images_per_prompt": 2,
        "policy.num_steps": 3,
        "policy.last_step": "deterministic",
        "update.micro_batch_size": 4,
    }
    overrides = [str(word) for pair in settings.items() for word in pair]
    return ["--config", CONFIG, "--repeats", "1", "--out", str(tmp_path / "peers.json"), "--override", *overrides]


def run(monkeypatch: pytest.MonkeyPatch, options: list[str]) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_peers.py", *options])
    return bench_peers.main()


@pytest.mark.slow
@pytest.mark.telling
def test_a_run_gives_ratios_ladder_stages_and_traces(one_process: None, options, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "trl", None)  # as if it were not installed
    assert run(monkeypatch, ["--profile", str(tmp_path / "trace"), *options]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    seconds = summary["seconds"]
    assert summary["speedup_over_paper_loop"] == seconds["paper_loop"]["median"] / seconds["ours"]["median"]
    assert summary["samples_per_second"]["ours"] == 4 / seconds["ours"]["median"]
    assert summary["speedup_over_paper_loop_cpu"] > 0 and summary["speedup_over_trl"] is None
    assert summary["trl"] is None and "trl" in summary["trl_reason"]
    assert [row["change"] for row in summary["ladder"]] == list(seconds) and len(seconds) == 5
    assert set(summary["speedup_over_paper_loop_by_stage"]) == {"sampling", "decode", "reward", "training"}
    assert {"machine", "command", "threads", "load_averages", "settings"} <= summary.keys()
    assert json.loads((tmp_path / "peers.json").read_text()) == summary
    assert summary["traces"]["paper_loop"]["operators"] > summary["traces"]["ours"]["operators"]
    for name in ("ours", "paper_loop"):
        assert b"training: backward" in gzip.decompress((tmp_path / "trace" / f"{name}.json.gz").read_bytes())
    check_stages(tmp_path / "peers_stages.csv")


def check_stages(path: Path) -> None:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"] for row in rows] == 2 * [*STAGES, "other"]
    calls = {(row["loop"], row["stage"]): (row["network_calls"], row["mean_batch"]) for row in rows}
    assert calls["paper_loop", "training: network"] == ("6", "2.0")  # three timesteps of two pairs
    assert calls["ours", "training: network"] == ("2", "4.0")  # eight transitions, the last action none of them
    assert calls["ours", "sampling: network"] == calls["paper_loop", "sampling: network"] == ("3", "4.0")
    for loop in ("ours", "paper_loop"):
        assert sum(float(row["share"]) for row in rows if row["loop"] == loop) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (["update.num_passes", "2"], "update.num_passes=2 is not what the paper's loop does; use 1"),
        (["policy.kind", "ddim"], "policy.kind=ddim is not what"),
    ],
)
def test_other_work_than_the_papers_is_refused(options, override, message: str, monkeypatch, capsys):
    assert run(monkeypatch, [*options, *override]) == 2
    assert message in capsys.readouterr().err


def test_trl_runs_an_epoch_where_it_is_installed(one_process: None, tiny_sd_folder: str):
    pytest.importorskip("trl")
    from benchmarks.speed.trl_ddpo import Batches, ddpo_epoch, reason_missing
    from rlcm_fast.rewards import build_reward
    from rlcm_fast.trajectory import Prompt

    assert reason_missing() is None
    rewards: Any = [(build_reward("jpeg_compressibility", {}), 1.0)]
    batches = Batches(num_samples=2, batch_size=1, num_steps=2)
    ddpo_epoch(tiny_sd_folder, [Prompt(text) for text in TEXTS], rewards, batches)()
    with pytest.raises(ValueError, match="trl_samples=3 must divide by trl_batch_sizes=2"):
        ddpo_epoch(tiny_sd_folder, [], rewards, Batches(num_samples=3, batch_size=2, num_steps=2))


def test_a_stage_stops_while_another_runs_within_it(monkeypatch: pytest.MonkeyPatch):
    ticks = iter([0.0, 1.0, 3.0, 7.0])
    monkeypatch.setattr("benchmarks.shared.stage_clock.time.perf_counter", lambda: next(ticks))
    clock = StageClock()
    with clock.stage("training: rest"), clock.stage("training: backward"):
        pass
    seconds, calls = clock.read()
    assert (seconds["training: rest"], seconds["training: backward"]) == (1 + 4, 2) and calls == {}
    assert not any(clock.read()[0].values())


def test_network_calls_count_with_their_batch_for_sampling_or_training():
    clock, network = StageClock(), torch.nn.Linear(2, 2)
    clock.watch(network)
    network(torch.zeros(5, 2))
    with torch.no_grad():
        network(torch.zeros(3, 2))
    seconds, calls = clock.read()
    assert calls == {"training: network": [5], "sampling: network": [3]}
    assert seconds["training: network"] > 0
