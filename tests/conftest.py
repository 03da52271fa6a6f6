"""What all tests share: one thread a process, two workers for the whole suite, folders of random pipelines.

Workers: `python -m pytest` hands whole files to two of them, since a file shares what it makes once for its tests.
Tests named on the command line, `-k`, `--lf` and `--pdb` run in this process, as two workers need ten seconds before
their first test. `-n` has the last word: `-n 0`, `-n 4`.

Slow: the suite without them ends in five minutes on two cores. What crashes processes through the launcher, tries many
inputs or many engines, or takes a minute is slow, if a quicker test fails where the same promise breaks. Those that are
also `telling` run in CI, `python -m pytest -m "slow and telling"`: what no quick test can show as it really is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before torch is imported, for processes that tests start, too. Two workers share two cores, and sums over several
# threads round differently.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadlines: the first example pays for what is set up once, and machines that run tests are busy.
settings.register_profile("rlcm_fast", deadline=None, derandomize=True)
settings.load_profile("rlcm_fast")

NUM_WORKERS = 2
# The files that take longest, begun first, so that no worker ends with one of them alone.
LONGEST = (
    "test_processes.py",
    "test_resume.py",
    "test_resize.py",
    "backbones/test_acceleration.py",
    "shapes/test_shipped_models.py",
    "test_recipes.py",
    "planner/test_remedies.py",
    "planner/test_estimate.py",
    "test_lora.py",
    "test_names.py",
)


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads its options
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Hand the whole suite to workers, unless the command line says how many."""
    option = config.option
    is_worker = hasattr(config, "workerinput")
    if is_worker or not config.pluginmanager.has_plugin("xdist") or option.numprocesses is not None or option.usepdb:
        return
    last_failed = getattr(option, "lf", False)  # pytest has the option only with its cache
    is_whole = all(Path(argument).is_dir() for argument in config.args) and not option.keyword and not last_failed
    if is_whole:
        option.numprocesses, option.dist, option.loadscopereorder = NUM_WORKERS, "loadfile", False


def pytest_collection() -> None:
    """Choose where kernels run before a test imports one; the process that hands out work collects nothing."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first."""
    rank = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def no_bars_of_other_tests() -> None:
    """Forgets progress bars that are still open: a trainer that a test builds and never runs leaves its own."""
    from tqdm import tqdm

    getattr(tqdm, "_instances", set()).clear()


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone; what it says in the environment is gone after the module."""
    from rlcm_fast.engine.processes import init_processes
    from rlcm_fast.train import set_process_environment

    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            patch.setenv(name, "")  # so that it is undone
            patch.delenv(name)
        set_process_environment()
        init_processes()
        yield


@pytest.fixture(scope="session")
def tiny_lcm_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A LatentConsistencyModelPipeline."""
    from benchmarks.shared import tiny_pipelines

    return tiny_pipelines.save_lcm(tmp_path_factory.mktemp("tiny_lcm"))


@pytest.fixture(scope="session")
def tiny_sd_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusionPipeline of the same sizes, with DDIM's scheduler."""
    from benchmarks.shared import tiny_pipelines

    return tiny_pipelines.save_sd(tmp_path_factory.mktemp("tiny_sd"))


@pytest.fixture(scope="session")
def tiny_sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A StableDiffusionXLPipeline: two text encoders, time ids, a diffusion model."""
    from benchmarks.shared import tiny_pipelines

    return tiny_pipelines.save_sdxl(tmp_path_factory.mktemp("tiny_sdxl"))


@pytest.fixture(scope="session")
def tiny_unet_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A consistency model's UNet alone, which goes into `tiny_sdxl_folder`."""
    from benchmarks.shared import tiny_pipelines

    return tiny_pipelines.save_unet_alone(tmp_path_factory.mktemp("tiny_unet"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips where there is none."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install 'rlcm_fast[test]'")
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("needs chromium and chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1280,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    found = webdriver.Chrome(options=options, service=Service(driver))
    yield found
    found.quit()
