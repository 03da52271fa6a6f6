"""The floors: a file imports only from lower floors, and rooms of one floor do not know each other."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "kernels": 0,
    "faults": 0,
    **dict.fromkeys(("patience", "permission", "bombs", "file_modes"), 0),
    **dict.fromkeys(("config", "trajectory", "parallel", "plugins", "grids", "quiet", "finite_json", "hub"), 1),
    **dict.fromkeys(("terminal", "leaving", "frozen", "given", "graphs"), 1),
    **dict.fromkeys(
        ("policies", "prompts", "pairs", "backbones", "rewards", "algorithms", "engine", "shapes", "report"), 2
    ),
    **dict.fromkeys(("tasks", "run_folder", "planner", "rating"), 3),
    "stages": 4,
    "build": 5,
    "handover": 5,
    "trainer": 6,
    "door": 6,
    "train": 7,
    **dict.fromkeys(("cli", "api"), 8),
    "compat": 9,
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
        assert not any(name.startswith("rlcm_fast") for name in runtime_imports(file)), "so that every door opens fast"
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


def runtime_imports(file: Path) -> set[str]:
    """The modules of ours that are imported when the file is: not in functions, not under TYPE_CHECKING."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def circle(imports: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; empty if there are none."""
    done: set[str] = set()

    def search(module: str, path: list[str]) -> list[str]:
        if module in path:
            return path[path.index(module) :]
        if module in done:
            return []
        for other in sorted(imports.get(module, set()) & imports.keys()):
            if found := search(other, [*path, module]):
                return found
        done.add(module)
        return []

    for module in sorted(imports):
        if found := search(module, []):
            return found
    return []


def test_no_modules_import_each_other_in_a_circle():
    assert circle({module_of(file): runtime_imports(file) - {module_of(file)} for file in FILES}) == []


def test_the_rule_finds_a_circle():
    assert sorted(circle({"a": {"b"}, "b": {"c", "x"}, "c": {"a"}, "d": {"a"}})) == ["a", "b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def classes(file: Path) -> list[ast.ClassDef]:
    return [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.ClassDef)]


def stored(node: ast.AST) -> set[str]:
    """The attributes of self that are assigned inside."""
    found = set()
    for inner in ast.walk(node):
        if not (isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store)):
            continue
        if isinstance(inner.value, ast.Name) and inner.value.id == "self":
            found.add(inner.attr)
    return found


def declared(node: ast.ClassDef) -> set[str]:
    """The attributes that __init__ assigns or the class's body declares."""
    found = set()
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.Assign):
            found |= {target.id for target in part.targets if isinstance(target, ast.Name)}
        elif isinstance(part, ast.FunctionDef) and (part.name == "__init__" or part.decorator_list):
            found |= stored(part) if part.name == "__init__" else {part.name}
    return found


def born_late(node: ast.ClassDef, known: dict[str, ast.ClassDef]) -> set[str]:
    """The attributes of a class that are assigned elsewhere and nowhere declared, its bases included."""
    names, bases = declared(node), [base.id for base in node.bases if isinstance(base, ast.Name)]
    while bases:
        base = known.get(bases.pop())
        if base is not None:
            names |= declared(base)
            bases += [other.id for other in base.bases if isinstance(other, ast.Name)]
    return stored(node) - names


def test_no_attribute_is_born_outside_of_init():
    every = [node for file in FILES for node in classes(file)]
    known = {node.name: node for node in every}
    late = {node.name: born_late(node, known) for node in every}
    assert {name: attributes for name, attributes in late.items() if attributes} == {}


def test_the_rule_finds_an_attribute_that_is_born_late():
    source = (
        "class A:\n    x: int\n    def __init__(self): self.a = 1\n    def f(self): self.a = self.x = self.late = 2\n"
    )
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    assert born_late(node, {}) == {"late"}


STAGES = [file for file in FILES if file.parent.name == "stages"]


@pytest.mark.parametrize("file", STAGES, ids=lambda file: file.stem)
def test_no_function_of_a_stage_takes_more_than_five_arguments(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            assert len([argument for argument in arguments if argument.arg != "self"]) <= 5, node.name


def test_the_loop_is_short_and_imports_little_of_ours():
    text = (ROOT / "rlcm_fast" / "trainer.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 160
    assert sum(line.startswith(("from rlcm_fast", "import rlcm_fast")) for line in text.splitlines()) <= 6
