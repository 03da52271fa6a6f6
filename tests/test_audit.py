"""`make audit`, with tools in the place of pip-audit and cyclonedx-py that answer as those do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLEAN = {"name": "numpy", "version": "2.0", "vulns": []}
KNOWN = {"name": "torch", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"]}, {"id": "PYSEC-2"}]}
SKIPPED = {"name": "rlcm-fast", "skip_reason": "it is not on the index"}


def tool(folder: Path, name: str, body: str) -> None:
    """Writes a command that runs Python with `out`, the file that its arguments name."""
    path = folder / name
    path.write_text(
        f"#!{sys.executable}\nimport sys\n"
        "names = {'--output', '--output-file'}\n"
        "out = next(b for a, b in zip(sys.argv, sys.argv[1:]) if a in names)\n" + body
    )
    path.chmod(0o755)


def audited(folder: Path, report: dict[str, Any] | None, code: int) -> subprocess.CompletedProcess[str]:
    """Runs the script in a copy of its folder; report: what pip-audit finds, None if it reaches no database."""
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "audit", folder / ".ci" / "audit")
    tool(folder, "cyclonedx-py", "open(out, 'w').write('{\"components\": [{}, {}]}')\n")
    written = "" if report is None else f"open(out, 'w').write({json.dumps(report)!r})\n"
    said = "no route to the database" if report is None else "Found vulnerabilities"
    tool(folder, "pip-audit", f"{written}sys.stderr.write('{said}\\n')\nsys.exit({code})\n")
    path = os.pathsep.join([str(folder), os.path.dirname(sys.executable), os.environ["PATH"]])
    return subprocess.run(
        ["bash", ".ci/audit"], cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("dependencies", "code", "lines"),
    [
        ([CLEAN, SKIPPED], 0, ["audit.json: 0 known vulnerabilities in 2 packages"]),
        (
            [CLEAN, KNOWN],
            1,
            ["torch: PYSEC-1", "torch: PYSEC-2", "audit.json: 2 known vulnerabilities in 2 packages"],
        ),
    ],
)
def test_known_vulnerabilities_are_listed_and_end_in_exit_code_1(
    tmp_path: Path, dependencies: list[dict[str, Any]], code: int, lines: list[str]
):
    done = audited(tmp_path, {"dependencies": dependencies, "fixes": []}, code)
    assert done.stdout.splitlines() == ["sbom.json: 2 packages", *lines]
    assert (done.returncode, done.stderr) == (code, "")


def test_without_a_network_the_audit_says_so_and_an_old_answer_is_not_read(tmp_path: Path):
    (tmp_path / "audit.json").write_text(json.dumps({"dependencies": [KNOWN]}))
    done = audited(tmp_path, None, 1)
    assert done.returncode == 0 and not (tmp_path / "audit.json").exists()
    assert done.stdout.splitlines()[1:] == [
        "audit: the database of vulnerabilities cannot be reached (no route to the database); run it again with a "
        "network"
    ]
