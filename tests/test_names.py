"""Names that others own: none of our modules shadows them, in a checkout that is run from its root."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAND_IN = "a stand-in for the distribution kernels"
IS_THE_STAND_IN = f"import kernels; assert kernels.__doc__ == {STAND_IN!r}, kernels"


@pytest.fixture(scope="module")
def path_with_kernels(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for PYTHONPATH in which a distribution `kernels` is installed, as pip would leave it."""
    folder = tmp_path_factory.mktemp("installed")
    (folder / "kernels").mkdir()
    source = f'"""{STAND_IN}"""\n__version__ = "0.0.1"\n'
    (folder / "kernels" / "__init__.py").write_text(source)
    (folder / "kernels-0.0.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.0.1\n"
    (folder / "kernels-0.0.1.dist-info" / "METADATA").write_text(metadata)
    return str(folder)


def run(arguments: list[str], path: str = "", cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": ""}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def names_in(folder: Path) -> set[str]:
    return {path.stem for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()} - {
        "__init__",
        "__pycache__",
    }


def requirements() -> set[str]:
    """The distributions that setup.py names, extras included, in the spelling of the packaging standard."""
    quoted = re.findall(r'"([A-Za-z][\w.-]*)(?:\[\w+\])?[<>=]=?[^"]*"', (ROOT / "setup.py").read_text(encoding="utf-8"))
    return {re.sub(r"[-_.]+", "-", name).lower() for name in quoted}


def names_of_dependencies() -> set[str]:
    """Top-level import names of the requirements that are installed here, and those of some that are not."""
    wanted = requirements()
    found = {
        name
        for name, owners in importlib.metadata.packages_distributions().items()
        if any(re.sub(r"[-_.]+", "-", owner).lower() in wanted for owner in owners)
    }
    return found | wanted | {"datasets", "evaluate", "trl", "yaml", "PIL"}


def test_requirements_are_read_from_setup_py():
    assert {"torch", "diffusers", "transformers", "deepspeed", "pytest", "kernels", "wandb", "pyyaml"} <= requirements()
    assert {"torch", "deepspeed", "yaml", "jsonargparse"} <= names_of_dependencies()


def test_no_module_of_ours_bears_a_name_of_the_standard_library_or_of_a_dependency():
    # rlcm_fast/kernels is the link to kernels/, which train.py takes off sys.path (the tests below run it).
    names = names_in(ROOT / "rlcm_fast") - {"kernels"}
    assert names & (set(sys.stdlib_module_names) | names_of_dependencies()) == set()


def test_the_folder_kernels_never_shadows_an_installed_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "with it, `import kernels` would find ours from the root"


def test_ours_and_the_installed_kernels_are_both_found(path_with_kernels: str):
    """On the path are both folders with a kernels of ours in them: the root and, as for a script there, rlcm_fast."""
    code = (
        "import sys; sys.path.insert(0, 'rlcm_fast')\n"
        f"from transformers import CLIPModel; {IS_THE_STAND_IN}\n"
        f"from rlcm_fast.kernels import functional; {IS_THE_STAND_IN}; assert hasattr(functional, 'gaussian_step')"
    )
    run(["-c", code], path_with_kernels)


def test_transformers_works_from_the_root_as_this_environment_is():
    """This process has the root on its path, and with it the folder kernels/."""
    from transformers import CLIPModel

    import kernels

    assert ROOT in {Path(entry).resolve() for entry in sys.path}
    assert ROOT / "kernels" not in {Path(folder) for folder in kernels.__path__}
    assert CLIPModel.__module__.startswith("transformers.")


def test_train_py_runs_as_a_script_beside_the_installed_kernels(path_with_kernels: str, tiny_lcm_folder: str):
    script = ["rlcm_fast/train.py", "--dry_run", f"--model.path={tiny_lcm_folder}", "--local_rank=0"]
    assert "total_queries" in run(script, path_with_kernels).stdout


def test_a_script_in_rlcm_fast_sees_its_package_and_not_its_modules_as_top_level(path_with_kernels: str):
    code = (
        "import sys; sys.path.insert(0, 'rlcm_fast')\n"
        "from rlcm_fast.train import find_own_package; find_own_package()\n"
        "import importlib.util as u; assert u.find_spec('trajectory') is None and u.find_spec('shapes') is None\n"
        f"import rlcm_fast.config; {IS_THE_STAND_IN}"
    )
    run(["-c", code], path_with_kernels)


def test_the_door_opens_where_the_package_is_not_installed(tmp_path: Path):
    run([str(ROOT / "rlcm_fast" / "train.py"), "--help"], cwd=tmp_path)


def test_pytest_collects_beside_the_installed_kernels(path_with_kernels: str):
    done = run(["-m", "pytest", "--collect-only", "-q", "tests/test_plugins.py"], path_with_kernels)
    assert "test_plugins.py" in done.stdout
