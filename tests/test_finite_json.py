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


def test_documents_that_people_read_are_written_by_finite_json():
    """A document is what has an indent; other calls make texts, hashes and headers, or allow no NaN."""
    for file in sorted((ROOT / "rlcm_fast").glob("**/*.py")):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("json.dumps", "json.dump"):
                words = {word.arg for word in call.keywords}
                is_known = file.name in ("finite_json.py", "folders.py")  # folders: sizes of a network
                assert "indent" not in words or "allow_nan" in words or is_known, f"{file}:{call.lineno}"


def test_a_state_that_is_not_finite_is_refused_before_its_file_is_opened(tmp_path: Path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "state.json", {"rewards": [1.0, math.nan]})
    assert not (tmp_path / "state.json").exists()
