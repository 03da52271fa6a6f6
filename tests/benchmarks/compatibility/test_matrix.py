"""The support matrix: its results are today's, docs/memory.md shows them, and what judges a cell notices a fault."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compatibility import matrix
from benchmarks.compatibility.cells import AXES, Cell, all_cells, config_of, refusal
from rlcm_fast.engine import optimizers
from rlcm_fast.engine.zero import ZeroEngine

ROOT = Path(__file__).resolve().parents[3]
PLAIN = Cell("all weights", "adamw", 1, "fp32", offload=False, in_backward=False, processes=1)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return matrix.read_rows()


def test_every_combination_has_its_row_and_none_fails(rows: list[dict[str, str]]):
    named = [tuple(row[axis] for axis in AXES) for row in rows]
    assert named == [tuple(str(getattr(cell, axis)) for axis in AXES) for cell in all_cells()]
    assert len(set(named)) == len(named) == 960
    assert {row["outcome"] for row in rows} == {"works", "refused"}


def test_refused_is_what_validate_refuses_today_and_in_its_words(rows: list[dict[str, str]]):
    for row, cell in zip(rows, all_cells(), strict=True):
        reason = refusal(cell)
        assert (row["outcome"], row["reason"]) == ("refused" if reason else "works", reason), cell


def test_the_tables_of_the_docs_are_those_of_the_results(rows: list[dict[str, str]]):
    assert matrix.markdown(rows) in (ROOT / "docs" / "memory.md").read_text(encoding="utf-8")


def test_a_failure_shows_in_the_table(rows: list[dict[str, str]]):
    spoilt = [dict(row) for row in rows]
    bad = next(
        row for row in spoilt if row["outcome"] == "works" and row["dtype"] == "bf16" and row["processes"] == "2"
    )
    bad["outcome"] = "FAILS"
    assert "bf16 FAILS" in matrix.markdown(spoilt)
    assert "FAILS" not in matrix.markdown(rows)


def test_cells_are_chosen_by_their_values():
    chosen = [cell for cell in all_cells() if matrix.matches(cell, ["dtype=bf16", "dtype=fp32", "zero_stage=3"])]
    assert Counter((cell.dtype, cell.zero_stage) for cell in chosen) == {("fp32", 3): 80, ("bf16", 3): 80}
    with pytest.raises(ValueError, match=r"only=zero_stage=4 names no cell; the axes are "):
        matrix.matches(PLAIN, ["zero_stage=4"])


def judged(model: str, folder: Path, cell: Cell = PLAIN) -> str:
    from benchmarks.compatibility import trial

    return trial.train_cell(config_of(cell, model, str(folder / "run"))).wrong


@pytest.mark.usefixtures("one_process")
def test_a_good_cell_is_found_good(tiny_lcm_folder: str, tmp_path: Path):
    assert judged(tiny_lcm_folder, tmp_path) == ""


@pytest.mark.usefixtures("one_process")
def test_an_optimizer_that_leaves_out_the_weight_decay_is_noticed(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def without(parameters: Any, weight_decay: float, **settings: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, weight_decay=0.0, **settings)

    monkeypatch.setattr(optimizers, "AdamW", without)
    assert judged(tiny_lcm_folder, tmp_path).endswith("of the way off the reference")


@pytest.mark.usefixtures("one_process")
def test_a_checkpoint_without_moments_is_noticed(tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    load = ZeroEngine.load

    def load_and_forget(engine: ZeroEngine, folder: Path, trusts_old: bool = False) -> None:
        load(engine, folder)
        for state in engine._engine.optimizer.optimizer.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(ZeroEngine, "load", load_and_forget)
    assert judged(tiny_lcm_folder, tmp_path) == "a resumed run ends elsewhere"


@pytest.mark.slow
def test_a_cell_that_breaks_or_hangs_is_recorded_and_the_next_is_trained(tiny_lcm_folder: str, tmp_path: Path):
    crew = matrix.Crew(2, tmp_path)
    pair = Cell(**{**vars(PLAIN), "processes": 2})
    broken = Cell(**{**vars(pair), "optimizer": "bnb_adamw_8bit", "zero_stage": 0, "in_backward": True})
    try:
        found = [
            crew.train(config_of(cell, tiny_lcm_folder, str(tmp_path / name)), limit)
            for name, cell, limit in (("breaks", broken, 300.0), ("hangs", pair, 0.1), ("works", pair, 300.0))
        ]
    finally:
        crew.dismiss()
    assert [row["outcome"] for row in found] == ["FAILS", "FAILS", "works"]
    assert found[0]["reason"] in ("rank 0: AssertionError", "rank 1: AssertionError")
    assert found[1]["reason"] == "not done after 0.1 seconds"


@pytest.mark.slow
def test_a_sample_of_the_matrix_works_still():
    """Each axis with each of its values, pairs of processes among them."""
    accepted = [cell for cell in all_cells() if not refusal(cell)]
    sample = accepted[::11]
    for axis, values in AXES.items():
        assert {getattr(cell, axis) for cell in sample} == set(values)
    wrong = [row for row in matrix.run(sample, limit=300.0) if row["outcome"] != "works"]
    assert not wrong
