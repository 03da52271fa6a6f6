"""Which implementation is taken, and what an impossible choice says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {key: value for key, value in os.environ.items() if key not in ("TRITON_INTERPRET", dispatch.ENVIRONMENT)}
    command = [sys.executable, "-c", f"import torch; from rlcm_fast.kernels import dispatch; {code}"]
    return subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs here")
def test_triton_on_a_cpu_without_the_interpreter_says_what_is_missing():
    done = in_a_process("dispatch.is_triton(torch.zeros(1))", RLCM_FAST_KERNELS="triton")
    assert "ValueError: kernels=triton cannot run on cpu: start with TRITON_INTERPRET=1" in done.stderr


def test_the_environment_variable_holds_where_the_choice_is_auto_as_in_a_config_without_one():
    asks = "print(dispatch.is_triton(torch.zeros(1)))"
    code = f"dispatch.set_default('auto'); {asks}\nwith dispatch.use('torch'): {asks}"
    done = in_a_process(code, RLCM_FAST_KERNELS="triton", TRITON_INTERPRET="1")
    assert done.stdout.split() == ["True", "False"], done.stderr


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


def test_a_wrong_environment_variable_fails_at_import():
    done = in_a_process("", RLCM_FAST_KERNELS="fast")
    assert "ValueError: RLCM_FAST_KERNELS=fast is unknown; use one of auto, torch, triton" in done.stderr
