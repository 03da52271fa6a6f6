"""The floors: a file imports only from lower floors, and rooms of one floor do not know each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": 0,
    **dict.fromkeys(("config", "trajectory", "parallel", "plugins", "grids", "quiet"), 1),
    **dict.fromkeys(("policies", "prompts", "pairs", "backbones", "rewards", "algorithms", "engine", "shapes"), 2),
    **dict.fromkeys(("tasks", "run_folder", "planner"), 3),
    "stages": 4,
    "build": 5,
    "trainer": 6,
    **dict.fromkeys(("train", "cli"), 7),
}
LINK = ROOT / "rlcm_fast" / "kernels"
FILES = sorted([*ROOT.glob("kernels/**/*.py"), *(p for p in ROOT.glob("rlcm_fast/**/*.py") if LINK not in p.parents)])


def part_of(module: str) -> str:
    """rewards of rlcm_fast.rewards.jpeg."""
    return [*module.split("."), ""][1]


def module_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT).with_suffix("").parts)
    parts = ["rlcm_fast", *parts] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def own_imports(file: Path) -> set[str]:
    """Every rlcm_fast module that the file imports, at whatever depth of its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found |= {f"{module}.{alias.name}" for alias in node.names} if module == "rlcm_fast" else {module}
    return {name for name in found if name.split(".")[0] in ("rlcm_fast", "kernels") or name.startswith(".")}


def offences(module: str, imports: set[str]) -> list[str]:
    """What is wrong with the imports of a module."""
    part = part_of(module)
    wrong = []
    for name in sorted(imports):
        if name.startswith("."):
            wrong.append(f"{module} imports {name}: write the whole name")
        elif name.split(".")[0] == "kernels":
            wrong.append(f"{module} imports {name}: that name is another distribution's, write rlcm_fast.{name}")
        elif part_of(name) not in FLOORS:
            wrong.append(f"{module} imports {name}, which stands on no floor")
        elif part_of(name) != part and FLOORS[part_of(name)] >= FLOORS[part]:
            wrong.append(f"{module} (floor {FLOORS[part]}) imports {name} (floor {FLOORS[part_of(name)]})")
    return wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file))
def test_a_file_imports_only_from_lower_floors(file: Path):
    module = module_of(file)
    if module == "rlcm_fast":
        assert own_imports(file) == set(), "rlcm_fast/__init__.py imports nothing, so that every door opens fast"
        return
    assert part_of(module) in FLOORS, f"{module} stands on no floor; add it to the table in CONTRIBUTING.md and here"
    assert offences(module, own_imports(file)) == []


@pytest.mark.parametrize(
    ("module", "imported"),
    [
        ("rlcm_fast.rewards.jpeg", "rlcm_fast.shapes.detector"),
        ("rlcm_fast.config", "rlcm_fast.trajectory"),
        ("rlcm_fast.trajectory", "rlcm_fast.policies.schedules"),
        ("rlcm_fast.kernels.functional", "rlcm_fast.trajectory"),
        ("rlcm_fast.trainer", "rlcm_fast.train"),
        ("rlcm_fast.rewards.jpeg", ".base"),
        ("rlcm_fast.policies.base", "kernels.functional"),
    ],
)
def test_the_rule_finds_an_offence(module: str, imported: str):
    assert len(offences(module, {imported})) == 1


def test_the_kernels_know_torch_and_triton_only():
    """patch.py apart, which is there for diffusers' models and which no other of them imports."""
    allowed = {*sys.stdlib_module_names, "torch", "triton", "rlcm_fast"}
    files = [file for file in ROOT.glob("kernels/**/*.py") if file.name != "patch.py"]
    assert not any("rlcm_fast.kernels.patch" in own_imports(file) for file in files)
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert {name.split(".")[0] for name in names} <= allowed, file


def test_the_files_were_found():
    assert LINK.is_symlink()
    assert LINK.resolve() == ROOT / "kernels"
    modules = {module_of(file) for file in FILES}
    assert {"rlcm_fast.kernels.functional", "rlcm_fast.config", "rlcm_fast.cli.main"} <= modules
