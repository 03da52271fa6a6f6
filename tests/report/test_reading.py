"""Reads run folders in any state: whole, short, broken, still going."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_runs import make_run

from rlcm_fast.report import read_run, read_runs, render
from rlcm_fast.report.reading import flat


def test_a_whole_run_is_read_without_a_problem(tmp_path: Path):
    run = read_run(make_run(tmp_path / "run"))
    assert run.problems == [] and run.num_iterations == run.num_planned == 10
    assert [number for number, _ in run.grids] == [0, 5, 10]
    assert [number for number, _ in run.guard_pictures] == [5]
    assert [images.iteration for images in run.evaluations] == [0, 10]  # the first and the latest
    assert run.evaluations[0].images[1].prompt == "a blue square"
    assert run.has_export and not run.is_alive


def test_a_run_with_a_fresh_lock_is_going_on(tmp_path: Path):
    run_dir = make_run(tmp_path / "run", is_ended=False)
    (run_dir / "lock").touch()
    assert read_run(run_dir).is_alive


def test_damaged_lines_are_counted_and_cost_no_others(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\xff\n[]\n" + b'{"iteration": 11, "rew')
    run = read_run(run_dir)
    assert len(run.lines) == 11 and run.problems == ["metrics.jsonl has 3 damaged lines, left out here"]


def test_a_line_that_a_resumed_run_wrote_again_counts_once(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 3, "loss": 5.0, "images_per_second": 1, "grad_norm": null, "x": NaN}\n')
    run = read_run(run_dir)
    assert len(run.lines) == 11 and run.column("loss") == [(3, 5.0)]
    assert not {"grad_norm", "x"} & set(run.keys)


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "environment.json"])
@pytest.mark.parametrize("content", [None, b"", b"\xff\0{", b"[1, 2]"])
def test_a_missing_or_damaged_file_leaves_a_page(tmp_path: Path, name: str, content: bytes | None):
    run_dir = make_run(tmp_path / "run", num_iterations=5)
    (run_dir / name).unlink()
    if content is not None:
        (run_dir / name).write_bytes(content)
    run = read_run(run_dir)
    assert "Verdict" in render([run])
    assert run.problems or content == b""


@pytest.mark.usefixtures("no_charts")
@pytest.mark.parametrize("name", ["0003.png", "scores.jsonl"])
def test_damaged_images_are_left_out(tmp_path: Path, name: str):
    run_dir = make_run(tmp_path / "run")
    (run_dir / "evaluation" / "000010" / name).write_bytes(b'\x89PNG\r\n\x1a\n{"image": 1, "scores": []}')
    (run_dir / "grids" / "000005.png").write_bytes(b"GIF89a")
    (run_dir / "grids" / "000000.png").write_bytes(b"")
    assert "Environment" in render([read_run(run_dir)])


def test_a_file_name_that_leaves_the_folder_is_not_followed(tmp_path: Path):
    run_dir = make_run(tmp_path / "run")
    row = '{"image": 0, "prompt": "", "scores": {"eval/jpeg": 1}, "file": "../../config.yaml"}\n'
    (run_dir / "evaluation" / "000010" / "scores.jsonl").write_text(row)
    assert read_run(run_dir).evaluations[-1].images[0].file is None


@pytest.mark.usefixtures("no_charts")
def test_a_run_before_its_first_line_has_a_page(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("num_iterations: 5\n")
    page = render([read_run(tmp_path)])
    assert "The run ended before its first iteration." in page and "there are no curves" in page


@pytest.mark.parametrize("is_folder", [True, False])
def test_what_is_no_run_is_refused(tmp_path: Path, is_folder: bool):
    folder = tmp_path if is_folder else tmp_path / "missing"
    with pytest.raises(ValueError, match=f"run={folder} .*; give the run_dir of a run"):
        read_run(folder)


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path):
    folders = [make_run(tmp_path / name, num_iterations=5) for name in ("a/run", "b/run", "other")]
    assert [run.name for run in read_runs([*folders, folders[0]])] == ["a/run", "b/run", "other"]


def test_a_run_that_is_named_twice_counts_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, other = (make_run(tmp_path / name, num_iterations=5) for name in ("run", "other"))
    (tmp_path / "link").symlink_to(run)
    monkeypatch.chdir(tmp_path)
    folders = [Path("run"), Path("other/../run"), run, Path("link"), other]
    assert [found.name for found in read_runs(folders)] == ["run", "other"]
    monkeypatch.chdir(run)
    assert [found.name for found in read_runs([Path(), Path("../other")])] == ["run", "other"]


@settings(max_examples=20)
@given(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda inner: st.dictionaries(st.text(max_size=2), inner, max_size=2)
    )
)
def test_flat_has_no_mappings_but_empty_ones(value: object):
    assert all(not isinstance(item, dict) or not item for item in flat({"a": value}).values())
