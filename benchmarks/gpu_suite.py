"""Everything that needs a GPU, in one command and under nine minutes: `make gpu`.

    make gpu                            # or: python benchmarks/gpu_suite.py
    make gpu WHEELS=FOLDER OUT=FOLDER   # wheels for a machine without pytest and matplotlib; another folder for results

In this order, each part with a time budget of its own: the tests marked `gpu`, `bench_kernels.py --quick`, and the same
operations under compute-sanitizer where it is installed. It needs torch and triton; pytest for the tests, which fail
the suite where it is missing; matplotlib for the picture, which `bench_kernels.py --redraw` makes elsewhere. Writes
benchmarks/results/gpu/DEVICE/: suite.json (which is also the last line on stdout), bench_kernels.csv, the picture, and
one .txt a part with what it said. A part that runs out of time is stopped, and suite.json says so.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reporting import ROOT, print_summary

_TEST_SECONDS, _BENCH_SECONDS, _SANITIZER_SECONDS = 150.0, 240.0, 90.0
_GRACE_SECONDS = 30.0  # for the benchmark to end the configuration that it is in


@dataclass(frozen=True)
class Part:
    """A command with its time budget, run from the repository's root."""

    name: str
    command: Sequence[str]
    seconds: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/gpu/DEVICE)")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, installed for this run alone, without an index")
    arguments = parser.parse_args()
    if importlib.util.find_spec("torch") is None:
        print("error: make gpu needs torch, which is not installed: pip install torch", file=sys.stderr)
        return 2
    import torch
    from kernel_timing import device_slug

    if not torch.cuda.is_available():
        print("error: make gpu needs a GPU, and torch sees no CUDA device here; nothing was run", file=sys.stderr)
        return 2
    out = arguments.out or ROOT / "benchmarks" / "results" / "gpu" / device_slug(torch.device("cuda"))
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        try:
            environment = environment_with(arguments.wheels, Path(folder) / "wheels")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        results = run_all(out.resolve(), Path(folder), environment)
    print_summary({**results, **_versions()}, out / "suite.json")
    return 0 if all(part["ok"] for part in results["parts"].values()) else 1


def environment_with(wheels: Path | None, target: Path) -> dict[str, str]:
    """The process's environment with the repository, and the packages of the wheels, on Python's path."""
    paths = [str(ROOT)]
    if wheels is not None:
        files = sorted(str(file) for file in wheels.glob("*.whl"))
        if not files:
            raise ValueError(f"wheels={wheels} has no .whl files; name a folder that has some")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--find-links", str(wheels), "--target", str(target), *files], check=True)
        sys.path.append(str(target))
        paths.append(str(target))
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*paths, inherited] if inherited else paths)
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # kernels run on the GPU
    return {**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def run_all(out: Path, scratch: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What came of the parts, the benchmark's summary, and what was cut or left out, in words."""
    has_plot = importlib.util.find_spec("matplotlib") is not None
    notes = [] if has_plot else ["no picture: matplotlib is not installed; bench_kernels.py --redraw draws it"]
    if importlib.util.find_spec("pytest") is None:
        notes.append("tests, sanitizer: pytest is not installed; make gpu WHEELS=FOLDER takes it from there")
    results: dict[str, Any] = {"parts": {}, "tests": {}, "bench_kernels": None}
    for part in parts_of(out, scratch, has_plot):
        print(f"{part.name}: at most {part.seconds:.0f} s", file=sys.stderr, flush=True)
        results["parts"][part.name] = run_part(part, out, environment)
        if not results["parts"][part.name]["ended"]:
            notes.append(f"{part.name}: stopped after {part.seconds:.0f} s, the rest of it was not run")
    for name in ("tests", "sanitizer"):
        results["tests"][name] = counts_of(scratch / f"{name}.xml")
    if results["parts"]["bench_kernels"]["ok"]:
        lines = (out / "bench_kernels.txt").read_text(encoding="utf-8").splitlines()
        summary = json.loads([line for line in lines if line.startswith("{")][-1])
        notes += [f"bench_kernels: not measured for want of time: {name}" for name in summary["cut"]]
        results["bench_kernels"] = summary
    return {**results, "cut_or_left_out": notes}


def parts_of(out: Path, scratch: Path, has_plot: bool) -> list[Part]:
    """tests/conftest.py is left out: it needs hypothesis, and the tests of a GPU do not need it."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "--noconftest", "-p", "no:cacheprovider", "-rs", "-v"]
    bench = [sys.executable, "benchmarks/bench_kernels.py", "--quick", "--out", str(out)]
    bench += ["--seconds", str(_BENCH_SECONDS), *([] if has_plot else ["--no-plot"])]
    tests, sanitizer = "tests/gpu/test_kernels_on_gpu.py", "tests/gpu/test_sanitizer.py"
    return [
        Part("tests", [*pytest, f"--junitxml={scratch / 'tests.xml'}", tests], _TEST_SECONDS),
        Part("bench_kernels", bench, _BENCH_SECONDS + _GRACE_SECONDS),
        Part("sanitizer", [*pytest, f"--junitxml={scratch / 'sanitizer.xml'}", sanitizer], _SANITIZER_SECONDS),
    ]


def run_part(part: Part, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Runs it with its output in OUT/NAME.txt; at the end of its time it and all that it started are stopped."""
    start = time.monotonic()
    with (out / f"{part.name}.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            process.wait(part.seconds)
            ended = True
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            ended = False
    seconds = round(time.monotonic() - start, 1)
    return {"ok": ended and process.returncode == 0, "ended": ended, "exit": process.returncode, "seconds": seconds}


def counts_of(report: Path) -> dict[str, Any] | None:
    """Tests run, failed and skipped, with the reasons, from pytest's XML; None where it wrote none."""
    if not report.exists():
        return None
    suite = ElementTree.parse(report).getroot()[0]
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    failed = [
        case.attrib["name"] for case in suite if case.find("failure") is not None or case.find("error") is not None
    ]
    reasons = {node.attrib["message"] for case in suite if (node := case.find("skipped")) is not None}
    return {**counts, "failed": failed, "reasons_of_skips": sorted(reasons)}


def _versions() -> dict[str, Any]:
    import torch
    import triton

    major, minor = torch.cuda.get_device_capability()
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    device = {"device": torch.cuda.get_device_name(), "capability": f"sm_{major}{minor}"}
    return {**versions, **device, "date": datetime.date.today().isoformat()}


if __name__ == "__main__":
    sys.exit(main())
