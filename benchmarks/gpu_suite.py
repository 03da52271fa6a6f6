"""Everything that needs a GPU, in one command and under nine minutes: `make gpu`.

    make gpu                            # or: python -m benchmarks.gpu_suite
    make gpu WHEELS=FOLDER OUT=FOLDER   # wheels for what a machine lacks (gpu_wheels.txt); another folder for results
    make gpu PART="tests full_size"     # these parts alone, each with 2.5 times its time
    make gpu PART=full_size ARGS="--modes off --micro-batch-sizes"   # a slice: options for the benchmark of one part

Each part is a command with a time budget of its own; one that runs out of it is stopped, and suite.json says so:

    tests          those marked `gpu`
    full_size      bench_full_size.py: an iteration of SD1.5's consistency model, eager and compiled: seconds, MFU, how
                   busy the GPU is; noise of the ratio, inference time, micro-batch sizes
    memory         bench_memory.py: peak memory of every strategy, SD1.5 and SDXL, capped at 24 GiB, beside the plan
    bench_kernels  bench_kernels.py --quick
    sanitizer      every operation of the kernels under compute-sanitizer, where that is installed

Without a GPU the same parts run on the CPU: the kernels' tests in Triton's interpreter, the model that ships in the
place of the full-size ones, and no sanitizer. It needs torch, triton and transformers, and what gpu_wheels.txt lists;
matplotlib for the picture, which `bench_kernels.py --redraw` makes elsewhere. Writes
benchmarks/results/gpu/DEVICE/: suite.json (which is also the last line on stdout) after each part, the CSV and JSON
files of the benchmarks, and one .txt a part with what it said. Parts that are not run again stay in suite.json, with
their date.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import signal
import site
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.shared.reporting import ROOT, print_summary

_GRACE_SECONDS = 20.0  # for a benchmark to end what it is in when its time is over
_BENCHMARKS = ("full_size", "memory", "bench_kernels")
_TESTS = ("tests", "sanitizer")
_PARTS = ("tests", "full_size", "memory", "bench_kernels", "sanitizer")
_LONGER = 2.5  # for a part that was asked for by name


@dataclass(frozen=True)
class Part:
    """A command with its time budget, run from the repository's root."""

    name: str
    command: Sequence[str]
    seconds: float


def main() -> int:
    arguments = _parser().parse_args()
    if importlib.util.find_spec("torch") is None:
        print("error: make gpu needs torch, which is not installed: pip install torch", file=sys.stderr)
        return 2
    import torch

    from benchmarks.kernels.kernel_timing import device_slug

    # What there is to run on.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print("torch sees no CUDA device: this tries the suite out on the CPU, with the small model", file=sys.stderr)
    out = arguments.out or ROOT / "benchmarks" / "results" / "gpu" / device_slug(device)
    with tempfile.TemporaryDirectory() as folder:
        # Install the wheels, and see whether anything is still missing before minutes of a GPU are spent.
        try:
            environment = environment_with(arguments.wheels, Path(folder) / "wheels")
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        if lacking := lacking_packages():
            way_out = "pip install them, or give WHEELS=FOLDER (gpu_wheels.txt says how to collect them)"
            print(f"error: make gpu needs {', '.join(lacking)}: {way_out}", file=sys.stderr)
            return 2
        # Run the parts, and write after each: what is cut off leaves those before it.
        has_plot = importlib.util.find_spec("matplotlib") is not None
        parts_here = parts_of if device.type == "cuda" else parts_on_cpu
        try:
            parts = chosen(parts_here(out.resolve(), Path(folder), has_plot), arguments.parts, arguments.args)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        out.mkdir(parents=True, exist_ok=True)
        results = earlier_results(out / "suite.json")
        for part in parts:
            results = with_part(results, part, out.resolve(), Path(folder), environment)
            print_summary({**results, "cut_or_left_out": gaps(results, has_plot), **_versions()}, out / "suite.json")
    return 0 if all(results["parts"][part.name]["ok"] for part in parts) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder (default benchmarks/results/gpu/DEVICE)")
    parser.add_argument("--parts", nargs="*", default=[], metavar="PART", help=f"of {', '.join(_PARTS)} (default all)")
    parser.add_argument("--args", default="", metavar="OPTIONS", help="more options for the benchmark of one part")
    parser.add_argument("--wheels", type=Path, help="folder of wheels, installed for this run alone, without an index")
    return parser


def environment_with(wheels: Path | None, target: Path) -> dict[str, str]:
    """The process's environment with the repository, and the packages of the wheels, on Python's path."""
    paths = [str(ROOT)]
    if wheels is not None:
        files = sorted(str(file) for file in wheels.glob("*.whl"))
        if not files:
            raise ValueError(f"wheels={wheels} has no .whl files; name a folder that has some")
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
        subprocess.run([*pip, "--find-links", str(wheels), "--target", str(target), *files], check=True)
        site.addsitedir(str(target))
        paths.append(str(target))
    inherited = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*paths, inherited] if inherited else paths)
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}  # tests/conftest.py sets it
    return {**kept, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}


def lacking_packages() -> list[str]:
    """The packages of gpu_wheels.txt that Python does not find; looked for before minutes of a GPU are spent.

    A line with a comment is of a package that the suite can do without.
    """
    lines = (Path(__file__).parent / "gpu_wheels.txt").read_text(encoding="utf-8").splitlines()
    names = [re.split(r"[<>=]", line)[0] for line in lines if "#" not in line]
    return [name for name in names if not list(importlib.metadata.distributions(name=name))]


def chosen(parts: Sequence[Part], names: Sequence[str], options: str = "") -> list[Part]:
    """The parts of these names, with more time each; or all of them. `options` are added to a benchmark's own."""
    for name in names:
        if name not in _PARTS:
            raise ValueError(f"PART={name} is no part of the suite; the parts are {', '.join(_PARTS)}")
    if options and (len(names) != 1 or names[0] not in _BENCHMARKS):
        raise ValueError(f"ARGS={options} needs one PART that is a benchmark: {', '.join(_BENCHMARKS)}")
    found = []
    for part in parts:
        if part.name in names:
            limit = part.seconds * _LONGER
            own = [_until(limit) if word == _until(part.seconds) else word for word in part.command]
            found.append(Part(part.name, [*own, *shlex.split(options)], limit))
    if names and not found:
        raise ValueError(f"PART={' '.join(names)} needs a GPU, and torch sees no CUDA device")
    return found or list(parts)


def earlier_results(file: Path) -> dict[str, Any]:
    """What an earlier call of the suite left; nothing where there is none, or where it ran on another device."""
    nothing: dict[str, Any] = {"parts": {}, "tests": {}}
    if not file.exists():
        return nothing
    known = json.loads(file.read_text(encoding="utf-8"))
    if known.get("device") != _versions()["device"]:
        return nothing
    return {key: value for key, value in known.items() if key in ("parts", "tests", *_BENCHMARKS)}


def with_part(
    results: dict[str, Any], part: Part, out: Path, scratch: Path, environment: dict[str, str]
) -> dict[str, Any]:
    """The results with what came of one more part, which this runs, and what it says of itself."""
    print(f"{part.name}: at most {part.seconds:.0f} s", file=sys.stderr, flush=True)
    came_of_it = {**run_part(part, out, environment), "date": datetime.date.today().isoformat()}
    results = {**results, "parts": {**results["parts"], part.name: {"limit": part.seconds, **came_of_it}}}
    if part.name in _TESTS:
        results["tests"] = {**results["tests"], part.name: counts_of(scratch / f"{part.name}.xml")}
    else:
        results[part.name] = summary_of(out / f"{part.name}.txt")
    return results


def gaps(results: dict[str, Any], has_plot: bool) -> list[str]:
    """What was cut or left out, in words."""
    notes = [] if has_plot else ["no picture: matplotlib is not installed; bench_kernels.py --redraw draws it"]
    for name, part in results["parts"].items():
        if not part["ended"]:
            limit = f" after {part['limit']:.0f} s" if "limit" in part else ""
            notes.append(f"{name}: stopped{limit}, the rest of it was not run")
    for name in _BENCHMARKS:
        notes += _gaps(name, results.get(name) or {})
    return notes


def _gaps(name: str, summary: dict[str, Any]) -> list[str]:
    """What a benchmark did not measure, in words."""
    notes = []
    for what in summary.get("left_out") or summary.get("cut") or []:
        notes.append(f"{name}: not measured for want of time: {what}")
    for what in summary.get("not_compiled", []):
        notes.append(f"{name}: torch.compile failed at {what}")
    return notes


def summary_of(log: Path) -> dict[str, Any] | None:
    """The JSON document that a benchmark ends with; None where it did not get so far."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    documents = [line for line in lines if line.startswith("{") and line.endswith("}")]
    return json.loads(documents[-1]) if documents else None


def parts_of(out: Path, scratch: Path, has_plot: bool) -> list[Part]:
    """On a GPU: 535 seconds if each takes all that it may.

    tests/conftest.py is left out: it needs hypothesis, and the tests of a GPU do not need it.
    """
    pytest = [*_PYTEST, "-m", "gpu", "--noconftest"]
    on_gpu = ("kernels", "libraries", "graphs")
    tests = [*(f"tests/gpu/test_{what}_on_gpu.py" for what in on_gpu), "tests/stages/test_no_waits.py"]
    sanitizer = "tests/gpu/test_sanitizer.py"
    plot = [] if has_plot else ["--no-plot"]
    return [
        Part("tests", [*pytest, f"--junitxml={scratch / 'tests.xml'}", *tests], 75),
        _benchmark("full_size", "speed/bench_full_size.py", out, 210, *_FEWER),
        _benchmark("memory", "memory/bench_memory.py", out, 105),
        _benchmark("bench_kernels", "kernels/bench_kernels.py", out, 100, "--quick", *plot),
        Part("sanitizer", [*pytest, f"--junitxml={scratch / 'sanitizer.xml'}", sanitizer], 45),
    ]


def parts_on_cpu(out: Path, scratch: Path, has_plot: bool) -> list[Part]:
    """The same code with less to do."""
    tests = [*_PYTEST, f"--junitxml={scratch / 'tests.xml'}", "tests/kernels/test_kernel_checks.py"]
    small = ["--config", "configs/shapes/compressibility.yaml", "--modes", "off", "--samples", "16"]
    sizes = ["--micro-batch-sizes", "4", "16", "--override", "rollout.micro_batch_size", "16"]
    strategies = [f"shapes {name}" for name in ("fp32 adamw block", "bf16 ZeRO-1 adamw block", "LoRA 16 of bf16")]
    kernels = ["--device", "cpu", "--quick", "--rows", "2", "--sizes", "4x8x8", *([] if has_plot else ["--no-plot"])]
    return [
        Part("tests", tests, 120),
        _benchmark("full_size", "speed/bench_full_size.py", out, 150, *small, *sizes, "update.micro_batch_size", "16"),
        _benchmark("memory", "memory/bench_memory.py", out, 150, "--cases", "shapes", "--only", *strategies),
        _benchmark("bench_kernels", "kernels/bench_kernels.py", out, 80, *kernels),
    ]


_FEWER = ("--samples", "32", "--inference-steps", "8", "--micro-batch-sizes", "16", "32")
_PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "-v"]


def _benchmark(name: str, script: str, out: Path, seconds: float, *options: str) -> Part:
    """It begins nothing in its last seconds, which are there to end what it is in."""
    own = ["--seconds", _until(seconds), "--out", str(out)]
    return Part(name, [sys.executable, f"benchmarks/{script}", *own, *options], seconds)


def _until(seconds: float) -> str:
    return str(seconds - _GRACE_SECONDS)


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
    failed, reasons = [], set()
    for case in suite:
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(case.attrib["name"])
        skipped = case.find("skipped")
        if skipped is not None:
            reasons.add(skipped.attrib["message"])
    return {**counts, "failed": failed, "reasons_of_skips": sorted(reasons)}


def _versions() -> dict[str, Any]:
    import torch
    import transformers
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    device: dict[str, Any] = {"device": "cpu"}
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        device = {
            "device": torch.cuda.get_device_name(),
            "capability": f"sm_{major}{minor}",
            "cuda": torch.version.cuda,
        }
    return {**versions, **device, "date": datetime.date.today().isoformat()}


if __name__ == "__main__":
    sys.exit(main())
