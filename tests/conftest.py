"""Folders of random pipelines, small enough for every test and made without a download."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is defined: they run in Triton's interpreter

# No deadlines: the first example pays for what is set up once, and machines that run tests are busy.
settings.register_profile("rlcm_fast", deadline=None, derandomize=True)
settings.load_profile("rlcm_fast")


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
