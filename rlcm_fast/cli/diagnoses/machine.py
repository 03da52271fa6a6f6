"""The machine: Python, memory, GPUs, the kernels, required and optional packages."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires, version

import psutil
import torch
from packaging.requirements import Requirement

from rlcm_fast.cli.diagnoses import GIB, Diagnosis, State
from rlcm_fast.kernels import dispatch, functional

_OLDEST_PYTHON = (3, 11)
_MOST_WRONG = 1e-4
"""Largest difference of the Triton and the torch kernel that is tried, of results around 1 in float32."""
_FOR_DEVELOPERS = ("test", "dev")


def machine() -> list[Diagnosis]:
    """Python, processors, memory, torch and every GPU."""
    memory = psutil.virtual_memory()
    is_old = sys.version_info[:2] < _OLDEST_PYTHON
    remedy = "; rlcm_fast needs 3.11 or newer" if is_old else ""
    rows = [
        Diagnosis(
            "python", State.WRONG if is_old else State.OK, f"{platform.python_version()}, {platform.platform()}{remedy}"
        ),
        Diagnosis(
            "memory",
            State.OK,
            f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free, {os.cpu_count()} processors",
            {"free_gib": memory.available / GIB},
        ),
    ]
    return [*rows, *_gpus()]


def _gpus() -> list[Diagnosis]:
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for CPUs"
        words = f"none that torch {torch.__version__} sees ({build}); models of 64 x 64 pixels train on a CPU"
        return [Diagnosis("GPU", State.NOTE, words)]
    rows = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        words = (
            f"{torch.cuda.get_device_name(index)}, {free / GIB:.1f} of {total / GIB:.1f} GiB free, compute capability "
            f"{major}.{minor}, CUDA {torch.version.cuda}"
        )
        busy = free < 0.9 * total
        rows.append(
            Diagnosis(
                f"GPU {index}",
                State.NOTE if busy else State.OK,
                words + ("; another process uses it" if busy else ""),
                {"free_gib": free / GIB, "total_gib": total / GIB},
            )
        )
    return rows


def kernels() -> Diagnosis:
    """Whether the Triton kernels run here, and agree with the torch implementation on a small step."""
    if not torch.cuda.is_available():
        return Diagnosis("kernels", State.OK, "torch; those in Triton are for GPUs")

    # Take the same sampling step with both.
    generator = torch.Generator().manual_seed(0)
    x, m, z = (torch.randn(4, 4, 16, 16, generator=generator).cuda() for _ in range(3))
    coef = torch.tensor([[0.9, 0.4, 0.2]]).expand(4, 3).contiguous().cuda()
    try:
        with dispatch.use("triton"):
            ours = functional.gaussian_log_prob(x, m, z, coef)
        with dispatch.use("torch"):
            theirs = functional.gaussian_log_prob(x, m, z, coef)
    except Exception as error:  # noqa: BLE001 - a compiler, a driver and Triton raise what they like
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        words = f"Triton does not run ({reason[:200]}); repair it, or set engine.kernels: torch"
        return Diagnosis("kernels", State.WRONG, words)

    # Compare.
    difference = ((ours - theirs) / theirs).abs().max().item()
    numbers = {"difference": difference}
    if difference > _MOST_WRONG:
        words = f"Triton differs from torch by {difference:.1g}; set engine.kernels: torch, and report it"
        return Diagnosis("kernels", State.WRONG, words, numbers)
    return Diagnosis("kernels", State.OK, f"Triton {version('triton')} agrees with torch to {difference:.0e}", numbers)


def packages() -> list[Diagnosis]:
    """The required packages in one row, unless one is wrong; then a row for each optional install."""
    try:
        needed = [Requirement(text) for text in requires("rlcm_fast") or []]
        extras = metadata("rlcm_fast").get_all("Provides-Extra") or []
    except PackageNotFoundError:
        words = "rlcm_fast is not installed, so what it requires is not known; pip install -e ."
        return [Diagnosis("packages", State.NOTE, words)]

    # Those that every run needs.
    always = [need for need in needed if need.marker is None or need.marker.evaluate({"extra": ""})]
    wrong = [problem for need in always if (problem := _problem(need))]
    if wrong:
        rows = [Diagnosis("packages", State.WRONG, f"{'; '.join(wrong)}: pip install -e .")]
    else:
        listed = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "transformers", "deepspeed"))
        rows = [Diagnosis("packages", State.OK, f"all {len(always)} as required: {listed}, ...")]

    # Those of each extra.
    for extra in extras:
        if extra in _FOR_DEVELOPERS:
            continue
        of_extra = [need for need in needed if need.marker and need.marker.evaluate({"extra": extra})]
        of_extra = [need for need in of_extra if need not in always]
        rows.append(_extra(extra, of_extra))
    return rows


def _extra(name: str, needed: list[Requirement]) -> Diagnosis:
    what = f"extra {name}"
    wrong = [problem for need in needed if (problem := _problem(need))]
    if wrong:
        return Diagnosis(what, State.NOTE, f"{'; '.join(wrong)}: pip install 'rlcm_fast[{name}]' if you need it")
    return Diagnosis(what, State.OK, ", ".join(f"{need.name} {version(need.name)}" for need in needed))


def _problem(need: Requirement) -> str:
    """What is wrong with a package; empty if it fits."""
    try:
        found = version(need.name)
    except PackageNotFoundError:
        return f"{need.name} is not installed"
    return "" if need.specifier.contains(found, prereleases=True) else f"{need.name} {found} is not {need.specifier}"
