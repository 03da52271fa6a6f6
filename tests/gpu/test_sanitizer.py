"""Every kernel under compute-sanitizer, where it is installed: no access out of bounds, no race.

By hand, from the repository's root, for each TOOL of memcheck, racecheck and synccheck:

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=.:benchmarks:tests/support \\
        compute-sanitizer --tool TOOL --error-exitcode 7 python tests/support/run_every_kernel.py

racecheck sees races in shared memory alone. Races between programs in global memory, as the last program of a row would
have without its acquire (arrival.py), no tool reports; test_kernels_on_gpu.py looks for their results.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
PLACES = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", ""), "/usr/local/cuda"]
PATH = os.pathsep.join([os.environ.get("PATH", ""), *(f"{place}/bin" for place in PLACES if place)])
SANITIZER = shutil.which("compute-sanitizer", path=PATH)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_every_kernel_is_clean(tool: str):
    assert SANITIZER is not None
    folders = [ROOT, ROOT / "benchmarks", ROOT / "tests" / "support", os.environ.get("PYTHONPATH", "")]
    # Freed blocks that torch keeps for later would hide an access beyond a tensor.
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    script = ROOT / "tests" / "support" / "run_every_kernel.py"
    command = [SANITIZER, "--tool", tool, "--error-exitcode", "7", sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
