"""What goes wrong in a run ends it with one line and exit code 1, and the finished iterations are saved first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_runs
import torch
from safetensors.torch import load_file

from rlcm_fast.engine.averaging import AveragingEngine
from rlcm_fast.run_folder.export import Exporter
from rlcm_fast.run_folder.interruption import Interruption
from rlcm_fast.stages.evaluation import Evaluator
from rlcm_fast.stages.images import TextToImage
from rlcm_fast.train import main

pytestmark = pytest.mark.usefixtures("one_process")

Patch = Callable[[type, str, int, Exception], None]


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("*"))


def last_line(capsys: pytest.CaptureFixture[str]) -> str:
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.splitlines()[-1]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Patch:
    """Makes call number `good_calls` + 1 of a method raise an error."""

    def patch(kind: type, name: str, good_calls: int, error: Exception) -> None:
        original, calls = getattr(kind, name), []

        def fails(*arguments: Any, **keywords: Any) -> Any:
            calls.append(1)
            if len(calls) == good_calls + 1:
                raise error
            return original(*arguments, **keywords)

        monkeypatch.setattr(kind, name, fails)

    return patch


@pytest.fixture(scope="module")
def uninterrupted(tiny_lcm_folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    assert main(tiny_runs.arguments(tiny_lcm_folder, run_dir, {"num_iterations": 4, "evaluation.every": 2})) == 0
    return run_dir


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nmore advice")
# An iteration decodes 2 micro-batches and goes backward 4 times: 2 updates of 2 micro-batches.
FAULTS = {
    "rollout": (TextToImage, "decode", 2 * 2 + 2 * 2 + 1, KeyError("x"), "KeyError: 'x' ("),
    "update": (AveragingEngine, "backward", 2 * 4 + 1, OUT_OF_MEMORY, "out of memory (CUDA out of memory. Tried to"),
    "evaluation": (Evaluator, "__call__", 1, OSError("the pictures are gone"), "OSError: the pictures are gone ("),
}


@pytest.mark.parametrize("place", FAULTS)
def test_finished_iterations_survive_an_error_and_the_resumed_run_equals_one_without(
    place: str,
    failing: Patch,
    tiny_lcm_folder: str,
    tmp_path: Path,
    uninterrupted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    run_dir = tmp_path / "run"
    arguments = tiny_runs.arguments(tiny_lcm_folder, run_dir, {"num_iterations": 4, "evaluation.every": 2})
    kind, name, good_calls, error, said = FAULTS[place]
    with monkeypatch.context():
        failing(kind, name, good_calls, error)
        assert main(arguments) == 1
        line = last_line(capsys)
    assert line.startswith(f"error: {said}")
    assert line.endswith("; the 2 finished iterations are saved: go on with --resume latest")
    assert checkpoints(run_dir) == ["iteration_000002"]
    assert (run_dir / "error.txt").exists() == (place != "update")

    monkeypatch.undo()
    assert main([*arguments, "--resume", "latest"]) == 0
    assert tiny_runs.metrics(run_dir) == tiny_runs.metrics(uninterrupted)
    weights, expected = (
        load_file(folder / "checkpoints/iteration_000004/unet.safetensors") for folder in (run_dir, uninterrupted)
    )
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_error_between_the_updates_of_an_iteration_says_what_the_saved_weights_have(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing(AveragingEngine, "backward", 4 + 2, OUT_OF_MEMORY)  # the second update of iteration 1
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run")) == 1
    assert "the 1 finished iterations are saved, with 1 updates of the next one in their weights" in last_line(capsys)
    assert checkpoints(tmp_path / "run") == ["iteration_000001"]
    resumed = [*tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run"), "--resume", "latest"]
    assert main(resumed) == 0
    assert [line["iteration"] for line in tiny_runs.metrics(tmp_path / "run")] == [0, 1, 2]


def test_an_error_after_the_last_checkpoint_names_it_and_saves_nothing_twice(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing(Exporter, "__call__", 0, OSError("no such device"))
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run")) == 1
    folder = tmp_path / "run" / "checkpoints" / "iteration_000003"
    assert last_line(capsys).endswith(f"all 3 finished iterations are saved: go on from {folder} with --resume latest")


def test_an_error_in_the_first_iteration_leaves_no_checkpoint(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing(TextToImage, "decode", 0, OUT_OF_MEMORY)
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run")) == 1
    line = last_line(capsys)
    assert "lower update.micro_batch_size=2 to 1 or rollout.micro_batch_size=2 to 1; rlcm-fast plan" in line
    assert line.endswith("the run has no checkpoint yet")
    assert checkpoints(tmp_path / "run") == []


def test_an_error_while_saving_does_not_hide_the_first_one(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing(TextToImage, "decode", 2, OUT_OF_MEMORY)
    failing(AveragingEngine, "save", 0, OSError("stale file handle"))
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run")) == 1
    line = last_line(capsys)
    assert line.startswith("error: out of memory")
    assert "saving the finished iterations failed, too (stale file handle)" in line


def test_debug_shows_the_traceback(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    failing(TextToImage, "decode", 2, KeyError("x"))
    assert main([*tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run"), "--debug", "true"]) == 1
    said = capsys.readouterr().err
    assert "Traceback" in said and "in fails" in said
    assert not (tmp_path / "run" / "error.txt").exists()


@pytest.mark.parametrize("every", [0, 1])
def test_a_run_that_diverged_is_not_done_and_its_last_good_checkpoint_stays_the_newest(
    every: int, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_dir = tmp_path / "run"
    good = tiny_runs.arguments(tiny_lcm_folder, run_dir, {"num_iterations": 2, "checkpoint.every": every})
    assert main(good) == 0
    capsys.readouterr()
    longer = [*good, "--num_iterations", "4", "--resume", "latest", "--optimizer.lr", "1e3"]
    assert main(longer) == 1
    line = last_line(capsys)
    assert "diverged" in line and "lower optimizer.lr" in line and "done" not in line
    folder = run_dir / "checkpoints" / "iteration_000002"
    assert line.endswith(f"the last good checkpoint is {folder}: --resume latest goes on from it")
    assert checkpoints(run_dir)[-1] == "iteration_000002"
    weights = load_file(folder / "unet.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())


def test_the_last_update_is_checked_too(tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    settings = {"num_iterations": 1, "optimizer.lr": 1e3, "optimizer.warmup_updates": 0, "update.num_updates": 1}
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)) == 1
    line = last_line(capsys)
    assert line.startswith("error: the weights after 1 iterations draw no images any more (latents of root mean square")
    assert checkpoints(tmp_path / "run") == []
    assert not (tmp_path / "run" / "export").exists()


def test_the_check_of_weights_changes_no_number(tiny_lcm_folder: str, tmp_path: Path, uninterrupted: Path):
    """It draws from a generator of its own: the same run with more checkpoints has the same metrics."""
    settings = {"num_iterations": 4, "evaluation.every": 2, "checkpoint.every": 1}
    assert main(tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)) == 0
    assert tiny_runs.metrics(tmp_path / "run") == tiny_runs.metrics(uninterrupted)


def test_a_stop_after_a_divergence_saves_nothing_and_names_the_last_good_checkpoint(
    tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run_dir = tmp_path / "run"
    arguments = tiny_runs.arguments(tiny_lcm_folder, run_dir, {"num_iterations": 1})
    assert main(arguments) == 0
    agreed = Interruption.agreed
    monkeypatch.setattr(Interruption, "agreed", lambda self: (run_dir / "stop").touch() or agreed(self))
    settings = {"resume": "latest", "num_iterations": 3, "optimizer.lr": 1e3, "optimizer.warmup_updates": 0}
    assert main(tiny_runs.arguments(tiny_lcm_folder, run_dir, settings)) == 1
    good = run_dir / "checkpoints" / "iteration_000001"
    assert last_line(capsys).endswith(f"the last good checkpoint is {good}: --resume latest goes on from it")
    assert checkpoints(run_dir) == [good.name]


def test_a_stop_right_after_a_checkpoint_does_not_write_it_again(
    tiny_lcm_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    run_dir, saved = tmp_path / "run", []
    save, agreed = AveragingEngine.save, Interruption.agreed
    monkeypatch.setattr(AveragingEngine, "save", lambda self, folder: saved.append(folder) or save(self, folder))
    monkeypatch.setattr(Interruption, "agreed", lambda self: (run_dir / "stop").touch() or agreed(self))
    assert main(tiny_runs.arguments(tiny_lcm_folder, run_dir, {"checkpoint.every": 1})) == 0
    assert checkpoints(run_dir) == ["iteration_000001"]
    assert len(saved) == 1


def test_after_going_back_an_error_names_the_checkpoint_that_the_run_went_back_to(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Newer ones of the abandoned iterations are still there: one has the number of the iterations since."""
    settings = {"num_iterations": 4, "checkpoint.every": 1, "checkpoint.keep": 4}
    arguments = tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", settings)
    assert main(arguments) == 0
    folder = tmp_path / "run" / "checkpoints"
    failing(AveragingEngine, "save", 0, OSError("stale file handle"))
    failing(TextToImage, "decode", 2 * 2 + 1, OUT_OF_MEMORY)  # in the second iteration after going back
    back = [*arguments, "--resume", str(folder / "iteration_000001"), "--checkpoint.every", "0"]
    capsys.readouterr()
    assert main(back) == 1
    line = last_line(capsys)
    assert "saving the finished iterations failed, too (stale file handle)" in line
    assert line.endswith(f"; go on from {folder}/iteration_000001 with --resume {folder}/iteration_000001")


def test_an_error_before_anything_new_is_finished_leaves_the_checkpoint_alone(
    failing: Patch, tiny_lcm_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = tiny_runs.arguments(tiny_lcm_folder, tmp_path / "run", {"num_iterations": 1})
    assert main(arguments) == 0
    weights = tmp_path / "run" / "checkpoints" / "iteration_000001" / "unet.safetensors"
    before = weights.read_bytes()
    failing(AveragingEngine, "backward", 3, OUT_OF_MEMORY)  # after an update that moved the weights
    capsys.readouterr()
    assert main([*arguments, "--num_iterations", "2", "--resume", "latest"]) == 1
    assert "all 1 finished iterations are saved: go on from" in last_line(capsys)
    assert weights.read_bytes() == before
