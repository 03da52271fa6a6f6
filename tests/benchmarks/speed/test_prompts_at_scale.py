from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed import prompts_at_scale as bench
from rlcm_fast.prompts import files, load_prompts, sources


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_an_indexed_file_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str):
    monkeypatch.setattr(sources, "MOST_CHECKED", 100)
    path = tmp_path / f"prompts{suffix}"
    bench.write_prompts(path, 500)
    prompts = load_prompts(str(path))
    assert isinstance(prompts, files.PromptFile) and len({*prompts}) == 500
    row = bench.measure(path, num_prompts=8, iterations=1000)
    assert row["file"] == suffix and row["file_mb"] == path.stat().st_size / 1e6
    assert min(row["start_seconds"], row["batch_ms_median"], row["resume_seconds"]) > 0
    assert 0 <= row["memory_growth_mb"] <= row["memory_growth_at_peak_mb"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("kind", "num_files"), [("hf:jsonl", 1), ("hf:parquet", 3)])
def test_a_streamed_folder_is_measured_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, num_files: int
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    bench.write_folder(folder, kind, lines=500, shards=3)
    assert len({*load_prompts(f"hf:{folder}")}) == 500
    row, state, expected = bench.measure_stream(folder, num_prompts=8, iterations=31)
    assert row["num_files"] == num_files and row["iterations"] == 31
    assert 0 < row["import_seconds"] <= row["start_seconds"]
    assert row["memory_growth_mb"] <= row["memory_growth_at_first_peak_mb"] <= row["memory_growth_at_peak_mb"]
    assert bench.resume_stream(folder, 8, state, expected)["resume_seconds"] > 0
    with pytest.raises(AssertionError, match="the resumed stream draws other prompts"):
        bench.resume_stream(folder, 8, state, expected[::-1])


@pytest.mark.parametrize(
    ("seconds", "peak_mb", "is_met"), [(4.9, 199.0, True), (5.1, 50.0, False), (1.0, 201.0, False)]
)
def test_the_targets_hold_for_every_source_or_are_missed(seconds: float, peak_mb: float, is_met: bool):
    good = {"start_seconds": 1.0, "memory_growth_at_peak_mb": 10.0}
    row = {"start_seconds": seconds, "memory_growth_at_peak_mb": peak_mb}
    assert bench.summarise([good, row], lines=10)["targets_met"] is is_met
    resumed = {"start_seconds": seconds, "memory_growth_at_peak_mb": 1.0, "memory_growth_at_resume_peak_mb": peak_mb}
    assert bench.summarise([good, resumed], lines=10)["targets_met"] is is_met


def test_it_answers_help():
    done = subprocess.run([sys.executable, bench.__file__, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--iterations" in done.stdout, done.stderr
