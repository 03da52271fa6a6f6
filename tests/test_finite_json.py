"""JSON without NaN and infinities."""

from __future__ import annotations

import ast
import json
import math
from pathlib import Path

import pytest

from rlcm_fast.engine.tensor_files import write_json
from rlcm_fast.finite_json import finite_json, not_finite

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_that_are_not_finite_become_null_at_any_depth():
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": math.inf}], "d": "nan", "e": 3, "f": (True, None)}
    expected = {"a": None, "b": [1.5, None, {"c": None}], "d": "nan", "e": 3, "f": [True, None]}
    assert json.loads(finite_json(value)) == expected
    assert not_finite({"a": math.nan, "b": 1.0, "c": math.inf, "d": 2}) == ["a", "c"]


def test_what_a_run_and_its_commands_write_is_never_nan():
    """Nothing else calls json.dumps but on text, to hash it, or with allow_nan=False."""
    on_text = {"mistakes.py", "evaluate.py", "folders.py", "agreement.py", "fingerprint.py"}
    allowed = {"finite_json.py", "tensor_files.py", "lock.py", *on_text}
    for file in sorted((ROOT / "rlcm_fast").glob("**/*.py")):
        names = {node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute)}
        assert not {"dumps", "dump"} & names or file.name in allowed, file


def test_a_state_that_is_not_finite_is_refused_before_its_file_is_opened(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "state.json", {"rewards": [1.0, math.nan]})
    assert not (tmp_path / "state.json").exists()
