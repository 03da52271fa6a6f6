"""Two hosts on one machine: `deepspeed --hostfile`, a process killed, resumed on one process and on four."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_over_a_hostfile_survives_the_loss_of_a_process(stage: int):
    command = [sys.executable, "benchmarks/compatibility/two_hosts.py", "--stages", str(stage)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    killed, alone, together = json.loads(done.stdout.splitlines()[-1])["runs"]
    assert killed["seconds"] < 60
    assert "lost another process of the run" in killed["said"]
    assert (alone["processes"], alone["exit_code"]) == (1, 0)
    assert (together["processes"], together["exit_code"]) == (4, 0)
