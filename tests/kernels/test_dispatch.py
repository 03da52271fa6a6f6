"""Which implementation is taken, and what an impossible choice says."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlcm_fast.kernels import dispatch, functional
from rlcm_fast.train import main

ROW, COEF = torch.zeros(1, 1, 2, 2), torch.ones(1, 3)


def test_auto_is_torch_on_a_cpu_and_a_choice_holds_for_its_block():
    assert not dispatch.is_triton(ROW)
    with dispatch.use("triton"):
        assert dispatch.is_triton(ROW)
        with dispatch.use("torch"):
            assert not dispatch.is_triton(ROW)
        assert dispatch.is_triton(ROW)
    assert not dispatch.is_triton(ROW)


def test_an_unknown_choice_lists_the_known_ones():
    with pytest.raises(ValueError, match="kernels=cuda is unknown; use one of auto, torch, triton"):
        dispatch.set_default("cuda")


def test_triton_refuses_float64_where_auto_takes_torch():
    wide = ROW.double()
    assert functional.gaussian_log_prob(wide, wide, wide, COEF.double()).dtype == torch.float64
    message = "kernels=triton computes in float32 .* pass float32; or"
    with dispatch.use("triton"), pytest.raises(ValueError, match=message):
        functional.gaussian_log_prob(wide, wide, wide, COEF.double())


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """dispatch.py, run anew as a process with this environment would run it: what it reads, it reads at import."""

    def run(**environment: str) -> Any:
        for name in ("TRITON_INTERPRET", dispatch.ENVIRONMENT):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        spec = importlib.util.spec_from_file_location("dispatch_started_anew", dispatch.__file__)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_on_a_cpu_without_the_interpreter_says_what_is_missing(started: Callable[..., Any]):
    with pytest.raises(ValueError, match="^kernels=triton cannot run on cpu: start with TRITON_INTERPRET=1"):
        started(RLCM_FAST_KERNELS="triton").is_triton(torch.zeros(1))


def test_the_environment_variable_holds_where_the_choice_is_auto_as_in_a_config_without_one(
    started: Callable[..., Any],
):
    anew = started(RLCM_FAST_KERNELS="triton", TRITON_INTERPRET="1")
    anew.set_default("auto")
    assert anew.is_triton(torch.zeros(1))
    with anew.use("torch"):
        assert not anew.is_triton(torch.zeros(1))


@pytest.mark.usefixtures("one_process")
@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_training_refuses_what_cannot_run_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(dispatch, "_interprets", False)
    monkeypatch.setattr(dispatch, "_choice", "auto")  # so that the run's is undone
    assert main(["--run_dir", str(tmp_path / "run"), "--engine.kernels", "triton"]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("error: kernels=triton cannot run on cpu: start with TRITON_INTERPRET=1")


def test_a_wrong_environment_variable_fails_at_import(started: Callable[..., Any]):
    with pytest.raises(ValueError, match="^RLCM_FAST_KERNELS=fast is unknown; use one of auto, torch, triton$"):
        started(RLCM_FAST_KERNELS="fast")
