"""The benchmarks' numbers on metrics written by hand; nothing is trained here."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "benchmarks"
SCRIPTS = (
    "learning/before_after",
    "speed/bench_iteration",
    "speed/bench_peers",
    "learning/compare_curves",
    "learning/gradient_signal",
    "learning/inference_steps",
    "learning/last_step",
    "learning/learning_curves",
    "compatibility/matrix",
)
CONFIG = os.path.relpath(FOLDER.parent / "configs" / "shapes" / "compressibility.yaml")
DETECTOR, JPEG = "eval/shapes_alignment/mean", "eval/jpeg_compressibility/mean"


@pytest.fixture
def load() -> Callable[[str], ModuleType]:
    """A module of benchmarks/, by its room and name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


def write_metrics(folder: Path, kilobytes: list[float], scores: list[float], seconds: float = 2.0) -> Path:
    """A run of len(kilobytes) - 1 iterations of 64 queries, evaluated before each and at the end."""
    lines = []
    for i, (size, score) in enumerate(zip(kilobytes, scores, strict=True)):
        evaluated = {JPEG: -size, "eval/jpeg_compressibility/std": 0.1, DETECTOR: score, "eval/diversity": 0.25}
        if i < len(kilobytes) - 1:
            rollout = {"reward/total/mean": float(i), "seconds/iteration": seconds, "seconds/update": 1.0}
            lines.append({"iteration": i, "queries": 64 * (i + 1), **rollout, **evaluated})
        else:
            lines.append({"iteration": i, "queries": 64 * i, **evaluated})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_benchmark_answers_help(name: str):
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout and "JSON" not in done.stderr


def scripts() -> list[Path]:
    """Every benchmark that is run by itself; clients run in the environments of other tools."""
    found = [file for file in FOLDER.rglob("*.py") if "clients" not in file.parts]
    return sorted(file for file in found if '__name__ == "__main__"' in file.read_text(encoding="utf-8"))


def calls_in(function: ast.FunctionDef, names: set[str]) -> list[ast.Call]:
    calls = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in names]


@pytest.mark.parametrize("file", scripts(), ids=lambda file: file.relative_to(FOLDER).as_posix())
def test_the_last_line_of_every_benchmark_is_json(file: Path):
    """Some function prints the summary, or run_figure does, and nothing goes to stdout after it in that function."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if "sys.exit(run_figure(" in ast.unparse(tree):
        return
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    printing = [function for function in functions if calls_in(function, {"print_summary"})]
    assert printing, "it prints no summary"
    for function in printing:
        last = max(call.lineno for call in calls_in(function, {"print_summary"}))
        later = [call for call in calls_in(function, {"print"}) if call.lineno > last]
        assert all("sys.stderr" in ast.unparse(call) for call in later), f"{function.name} prints after the summary"


def test_a_row_stands_where_its_weights_had_been_paid_for(load, tmp_path: Path):
    rows = load("shared.training_runs").curve(write_metrics(tmp_path / "run", [2.0, 1.8, 1.5], [0.9, 0.8, 0.7]), seed=7)
    assert [row["queries"] for row in rows] == [0, 64, 128]
    assert [row["seconds"] for row in rows] == [0, 2, 4]
    assert {row["seed"] for row in rows} == {7}
    assert set(rows[0]) == {
        "seed", "iteration", "queries", "seconds", "reward/total/mean", JPEG, DETECTOR, "eval/diversity"
    }  # fmt: skip


def test_the_summary_takes_the_flat_image_off_and_compares_seed_by_seed(load, tmp_path: Path):
    runs, learning = load("shared.training_runs"), load("learning.learning_curves")
    curves = [
        runs.curve(write_metrics(tmp_path / "0", [1.7, 1.5, 1.2], [0.9, 0.9, 0.9]), 0),
        runs.curve(write_metrics(tmp_path / "1", [2.7, 2.5, 1.7], [0.8, 0.8, 0.6]), 1),
    ]
    summary = learning.summarise(curves, flat_kb=0.7)
    assert summary["payload_kb"]["start"]["mean"] == pytest.approx((1.0 + 2.0) / 2)
    assert summary["payload_kb"]["relative_change"]["mean"] == pytest.approx(-0.5)
    assert summary["payload_kb"]["relative_change"]["standard_error"] == pytest.approx(0, abs=1e-12)
    assert summary["detector_ratio"]["mean"] == pytest.approx((1 + 0.75) / 2)
    assert summary["detector_ratio"]["standard_error"] == pytest.approx(0.125)
    assert summary["held_out"][DETECTOR]["change"]["mean"] == pytest.approx(-0.1)
    assert summary["rollouts"]["reward/total/mean"]["start"]["mean"] == pytest.approx(0.5)
    assert summary["queries"]["mean"] == 128 and summary["seconds"]["mean"] == 4


def test_a_time_limit_judges_the_last_evaluation_before_it(load, tmp_path: Path):
    rows = load("shared.training_runs").curve(write_metrics(tmp_path / "0", [1.7, 1.5, 1.2], [0.9, 0.9, 0.9]), 0)
    summary = load("learning.learning_curves").summarise([rows], flat_kb=0.7, until_seconds=3)
    assert summary["held_out"][JPEG]["end"] == {"mean": -1.5, "standard_error": None}
    assert summary["seconds"]["mean"] == 2


def test_incompressibility_has_a_payload_too(load, tmp_path: Path):
    rows = load("shared.training_runs").curve(write_metrics(tmp_path / "0", [1.7, 2.7], [0.9, 0.9]), 0)
    name = "eval/jpeg_incompressibility/mean"
    turned = [{**{k: v for k, v in row.items() if k != JPEG}, name: -row[JPEG]} for row in rows]
    summary = load("learning.learning_curves").summarise([turned], 0.7)
    assert summary["payload_kb"]["relative_change"]["mean"] == pytest.approx(1)


def test_a_flat_image_has_the_size_that_the_readme_states(load):
    assert load("learning.learning_curves").flat_image_kilobytes(64, 95) == pytest.approx(0.69, abs=0.01)


def test_curves_are_averaged_where_all_seeds_were_evaluated(load):
    curves = [
        [{"iteration": 0, "seconds": 0.0, "m": 1.0}, {"iteration": 5, "seconds": 10.0, "m": 3.0}],
        [{"iteration": 0, "seconds": 0.0, "m": 3.0}, {"iteration": 5, "seconds": 20.0, "m": 3.0}],
    ]
    curves[1].append({"iteration": 9, "seconds": 30.0, "m": 0.0})  # one seed alone
    assert load("shared.training_runs").mean_and_spread(curves, "m", "seconds") == ([0, 15], [2, 3], [2**0.5, 0])


def test_csv_and_picture_are_written(load, tmp_path: Path):
    curves = [load("shared.training_runs").curve(write_metrics(tmp_path / "0", [1.7, 1.5], [0.9, 0.9]), 0)]
    load("shared.reporting").write_csv(tmp_path / "new" / "a.csv", curves[0])
    with (tmp_path / "new" / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row[JPEG]) for row in rows] == [-1.7, -1.5]
    assert rows[1]["reward/total/mean"] == ""
    load("learning.learning_curves").plot(curves, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_last_steps_are_compared_at_equal_queries_and_at_equal_seconds(load, tmp_path: Path):
    curve = load("shared.training_runs").curve
    quick = curve(write_metrics(tmp_path / "d", [2.0, 1.8, 1.6], [1, 1, 1], seconds=1.0), 0)
    slow = curve(write_metrics(tmp_path / "r", [2.0, 1.9, 1.8], [1, 1, 1], seconds=2.0), 0)
    summary = load("learning.last_step").summarise({"deterministic": [quick], "renoise": [slow]}, JPEG)
    assert summary["at_equal_queries"]["queries"] == 128
    assert summary["at_equal_queries"]["deterministic_ahead_by"]["mean"] == pytest.approx(0.2)
    assert summary["at_equal_queries"]["ratio_of_mean_gains"] == pytest.approx(2)
    assert summary["at_equal_seconds"]["seconds"] == 2
    assert summary["at_equal_seconds"]["gain"]["renoise"]["mean"] == pytest.approx(0.1)
    assert summary["seconds_per_iteration"]["renoise"]["mean"] == pytest.approx(2)


def test_settings_are_compared_where_they_have_come_equally_far(load, tmp_path: Path):
    runs, bench = load("shared.training_runs"), load("learning.compare_curves")
    fast = [[2.0, 1.6, 1.2], [2.0, 1.5, 1.3]]  # both at 1.4 after 96 queries
    slow = [[2.0, 1.9, 1.8], [2.0, 1.6, 1.2]]  # the first seed never
    paths = []
    for name, seeds in (("fast", fast), ("slow", slow)):
        folders = [write_metrics(tmp_path / name / str(i), sizes, [0.9, 0.7, 0.5]) for i, sizes in enumerate(seeds)]
        rows = [row for seed, folder in enumerate(folders) for row in runs.curve(folder, seed)]
        paths.append(tmp_path / f"{name}.csv")
        load("shared.reporting").write_csv(paths[-1], rows)
    curves = {path.stem: bench.read_curves(path) for path in paths}
    quick, late = bench.compare(curves, JPEG, -1.4)
    assert (quick["seeds"], quick["seeds_there"], late["seeds"], late["seeds_there"]) == (2, 2, 2, 1)
    assert quick["queries"] == pytest.approx((96 + 96) / 2)
    assert quick[DETECTOR] == pytest.approx(0.6)
    assert quick[f"{JPEG}/standard_error"] == pytest.approx(0, abs=1e-9)
    assert late["queries"] == pytest.approx(96) and late["queries/standard_error"] is None
    assert bench.compare(curves, JPEG, -1.0)[0] == {"setting": "fast", "seeds": 2, "seeds_there": 0}
    with pytest.raises(ValueError, match="reach=eval/beauty/mean is not in the curves fast; give one of"):
        bench.compare(curves, "eval/beauty/mean", 1.0)
    bench.plot(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_two_tuned_steps_are_held_against_four_base_steps(load):
    def row(kind: str, model: str, steps: int, mean: float) -> dict:
        numbers = {"mean": mean, "std": 1.0, "standard_error": 0.3, "seconds_per_image": 0.1}
        return {"kind": kind, "model": model, "num_steps": steps, "reward": "r", **numbers}

    rows = [row("base", "b", 2, 0.0), row("base", "b", 4, 1.0), row("tuned", "t", 2, 1.5), row("tuned", "t", 4, 9.0)]
    summary = load("learning.inference_steps").summarise(rows, ["r"])
    assert summary["two_step_tuned_beats_four_step_base"] is True
    assert summary["two_step_tuned_minus_four_step_base"]["r"]["mean"] == 0.5
    assert summary["two_step_tuned_minus_four_step_base"]["r"]["standard_error"] == pytest.approx(0.18**0.5)
    assert summary["table"]["r"] == {"base": {"2": 0.0, "4": 1.0}, "tuned": {"2": 1.5, "4": 9.0}}


def test_a_model_is_drawn_before_and_after_with_the_same_noise(load, tmp_path: Path, monkeypatch):
    bench = load("learning.before_after")
    out = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["b.py", "--tuned", "shapes/lcm", "--columns", "2", "--out", str(out)])
    means = bench.draw_rows(bench._parser().parse_args())
    assert list(means) == ["before, 4 steps", "after, 4 steps", "after, 2 steps"] and out.exists()
    before, same, fewer = means.values()
    assert before == same != fewer


def test_overheads_are_ratios_of_neighbours(load):
    bench = load("speed.bench_iteration")
    bare = {"sampling": 2.0, "decode": 1.0, "forward_backward": 6.0, "reference": 0.0, "optimizer": 1.0, "cpu": 8.0}
    pairs = [bench.pair({"wall": wall, "cpu": 8.8}, bare) for wall in (10.0, 11.0, 12.0)]
    summary = bench.summarise(pairs)
    assert summary["overhead_median"] == pytest.approx(1.1)
    assert summary["overhead_p90"] == pytest.approx(1.18)
    assert summary["overhead_cpu_median"] == pytest.approx(1.1)
    shares = {row["stage"]: row["share"] for row in bench.stage_shares(pairs)}
    assert shares["sampling"] == pytest.approx(2 / 11) and shares["other"] == pytest.approx(1 / 11)


def test_a_finished_run_is_not_repeated_and_one_of_other_settings_is_refused(load, tmp_path: Path):
    from rlcm_fast.config import parse_config, to_yaml

    runs = load("shared.training_runs")
    wanted = {}
    for seed in range(8):
        folder = tmp_path / f"seed_{seed}"
        wanted[folder] = runs.train_arguments(CONFIG, ["num_iterations", "3"], seed, folder)
        (folder / "export").mkdir(parents=True)
        noted = ["--resume", "latest", "--engine.compile", "off", "--engine.attention", "sdpa"]  # in place of auto
        (folder / "config.yaml").write_text(to_yaml(parse_config([*wanted[folder], *noted])))
        (folder / "export" / "model_index.json").write_text("{}")
    runs.train_all(wanted, jobs=4)
    wanted[folder] = runs.train_arguments(CONFIG, ["num_iterations", "4"], 7, folder)
    with pytest.raises(ValueError, match="num_iterations=3, but num_iterations=4"):
        runs.train_all(wanted, jobs=4)
    wanted[folder] = runs.train_arguments(CONFIG, ["num_iterations", "3", "guard.floors", "{jpeg_kb: 0.5}"], 7, folder)
    with pytest.raises(ValueError, match=r"guard.floors.jpeg_kb=None, but guard.floors.jpeg_kb=0.5"):
        runs.train_all(wanted, jobs=4)


FAKE_TRAINING = """
import os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--run_dir") + 1])
print("threads", os.environ["OMP_NUM_THREADS"])
folder.mkdir(parents=True)
other = folder.parent / {"seed_0": "seed_1", "seed_1": "seed_0"}[folder.name]
while not other.exists():  # ends only if the two run at the same time
    time.sleep(0.01)
if "fail" in sys.argv:
    sys.exit(3)
(folder / "export").mkdir()
(folder / "export" / "model_index.json").write_text("{}")
"""


@pytest.mark.parametrize("is_good", [True, False])
def test_jobs_run_at_a_time_and_log_to_a_file_each(load, tmp_path: Path, monkeypatch, is_good: bool):
    runs = load("shared.training_runs")
    (tmp_path / "rlcm_fast").mkdir()
    (tmp_path / "rlcm_fast" / "train.py").write_text(FAKE_TRAINING)
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    monkeypatch.setattr(runs.os, "cpu_count", lambda: 6)
    folders = [tmp_path / "runs" / f"seed_{seed}" for seed in (0, 1)]
    wanted = {folder: ["--run_dir", str(folder)] for folder in folders}
    if not is_good:
        wanted[folders[1]].append("fail")
        with pytest.raises(ValueError, match=r"seed_1 ended early \(exit code 3\)"):
            runs.train_all(wanted, 2)
    else:
        runs.train_all(wanted, 2)
    assert runs.is_finished(folders[0]) and runs.is_finished(folders[1]) == is_good
    assert (tmp_path / "runs" / "seed_0.log").read_text() == "threads 3\n"


def test_after_a_failed_run_no_other_is_begun(load, tmp_path: Path, monkeypatch):
    runs = load("shared.training_runs")
    begun: list[Path] = []

    def fail(_: list[str], folder: Path, jobs: int) -> None:
        begun.append(folder)
        if len(begun) == 1:
            raise ValueError(f"{folder.name} ended early")
        time.sleep(0.1)

    monkeypatch.setattr(runs, "train", fail)
    with pytest.raises(ValueError, match="ended early"):
        runs.train_all({tmp_path / str(i): [] for i in range(50)}, 1)
    assert len(begun) < 50


@pytest.mark.parametrize("overrides", [["num_iterations"], ["run_dir", "x"]])
def test_wrong_overrides_are_refused(load, overrides: list[str]):
    with pytest.raises(ValueError, match="override="):
        load("shared.training_runs").train_arguments("c.yaml", overrides, 0, Path("runs/x"))


def test_the_last_line_is_one_json_document(load, capsys: pytest.CaptureFixture[str]):
    load("shared.reporting").print_summary({"overhead_median": 1.0})
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["overhead_median"] == 1.0
    assert {"machine", "command", "threads"} <= document.keys()


def test_signal_and_noise_of_gradients_are_those_they_were_drawn_with(load):
    bench = load("learning.gradient_signal")
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(20_000, generator=generator)
    noisy = [signal + 3 * torch.randn(20_000, generator=generator) for _ in range(4)]
    found = bench.signal(noisy, images=100)
    assert found["signal_share"] == pytest.approx(0.1, abs=0.02)
    assert found["images_needed"] == pytest.approx(900, rel=0.2)
    nothing = bench.signal([torch.randn(20_000, generator=generator) for _ in range(4)], images=100)
    assert nothing["signal_share"] == pytest.approx(0, abs=0.02) and nothing["images_needed"] is None


def test_rows_are_for_every_action_plain_and_as_adam_sees_them(load):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-6, 3, 1000)
    batches = [[scale * (1 + torch.randn(1000, generator=generator)) for _ in range(2)] for _ in range(4)]
    rows = load("learning.gradient_signal").signal_rows(batches, images=10)
    assert [(row["metric"], row["action"]) for row in rows] == [
        (metric, action) for metric in ("plain", "adam") for action in ("0", "1", "all")
    ]
    assert rows[-1]["signal_share"] == pytest.approx(2 / 3, abs=0.1)  # two draws of signal 1, noise 1: 4 against 2


def test_gradient_signal_measures_a_config(load, one_process: None, tiny_lcm_folder: str):
    from rlcm_fast.config import parse_config

    settings = {"model.path": tiny_lcm_folder, "prompts.num_prompts": 2, "update.micro_batch_size": 8}
    options = [text for field, value in settings.items() for text in (f"--{field}", str(value))]
    config = parse_config(["--config", CONFIG, *options])
    batches = load("learning.gradient_signal").measure(config, 3)
    assert [len(batch) for batch in batches] == [3, 3, 3]  # three actions of four steps
    assert len({batch[0].shape for batch in batches}) == 1 and not torch.equal(batches[0][0], batches[1][0])
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for batch in batches for gradient in batch)
