"""What one process finds wrong ends all of them; the other processes here are faked gathers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlcm_fast import parallel
from rlcm_fast.config import Config, OptimizerConfig, RewardConfig
from rlcm_fast.faults import SharedMistake
from rlcm_fast.run_folder import agreement
from rlcm_fast.run_folder.agreement import check_configs, check_folder, check_visible, together
from rlcm_fast.run_folder.fingerprint import flat


def gathers(monkeypatch: pytest.MonkeyPatch, *answers: Callable[[list[Any]], list[Any]]) -> None:
    """Each gather in turn returns what its answer makes of this process's list."""
    waiting = list(answers)
    monkeypatch.setattr(parallel, "all_gather_list", lambda mine: waiting.pop(0)(mine))


def without_debug(config: Config) -> dict[str, Any]:
    return {name: value for name, value in flat(config).items() if name != "debug"}


def test_a_mistake_of_another_process_is_raised_here(monkeypatch: pytest.MonkeyPatch):
    gathers(monkeypatch, lambda mine: [*mine, "run_dir=x is full"])
    with pytest.raises(SharedMistake, match="run_dir=x is full"), together():
        pass


def test_a_mistake_here_is_raised_only_after_the_others_know_it(monkeypatch: pytest.MonkeyPatch):
    sent: list[Any] = []
    gathers(monkeypatch, lambda mine: sent.extend(mine) or [None, *mine])
    with pytest.raises(SharedMistake, match="wrong"), together():
        raise ValueError("wrong")
    assert sent == ["wrong"]


def test_configs_that_differ_are_named_field_by_field_with_their_rank_and_host(monkeypatch: pytest.MonkeyPatch):
    mine = Config()
    theirs = replace(mine, optimizer=OptimizerConfig(lr=2e-4), rewards=[RewardConfig("jpeg_compressibility", 2.0)])
    gathers(
        monkeypatch,
        lambda digests: [*digests, *digests, "other"],
        lambda everyone: [*everyone, *everyone, ("node2", {**everyone[0][1], **without_debug(theirs)})],
    )
    with pytest.raises(SharedMistake) as caught:
        check_configs(mine)
    assert str(caught.value) == (
        "the processes have different configs: rewards[jpeg_compressibility].weight=1.0 on rank 0 and 2.0 on rank 2 "
        "(node2); optimizer.lr=0.0001 on rank 0 and 0.0002 on rank 2 (node2); give all nodes the same files and the "
        "same command"
    )


def test_equal_configs_and_another_debug_pass(monkeypatch: pytest.MonkeyPatch):
    digests: list[str] = []
    monkeypatch.setattr(parallel, "all_gather_list", lambda mine: digests.extend(mine) or mine)
    check_configs(Config())
    check_configs(replace(Config(), debug=True))
    check_configs(replace(Config(), seed=1))
    assert digests[0] == digests[1] != digests[2]


def test_a_run_dir_that_is_not_shared_names_the_nodes(monkeypatch: pytest.MonkeyPatch):
    gathers(
        monkeypatch,
        lambda mine: mine,
        lambda mine: [("node1", True), ("node1", True), ("node2", False), ("node2", False), ("node3", False)],
    )
    with pytest.raises(SharedMistake) as caught:
        check_folder(Path("runs/x"), "token", lambda: "token", patience=0.0)
    assert str(caught.value) == (
        "run_dir=runs/x is not shared: what node1 wrote there is not seen on node2 (rank 2), node3 (rank 4); give a "
        "run_dir on a file system that all nodes mount"
    )


def test_a_file_that_is_seen_late_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = iter([None, "an old one", "token"])
    monkeypatch.setattr(agreement.time, "sleep", lambda seconds: None)
    check_folder(tmp_path / "run", "token", lambda: next(answers), patience=60.0)
    with pytest.raises(SharedMistake, match="resume=latest is not shared: what .* wrote there is not seen on"):
        check_visible(tmp_path / "state.json", "resume=latest", patience=0.0)
