"""docs/config.md and docs/config_training.md are what the dataclasses say today."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

from rlcm_fast.config import Config
from rlcm_fast.config.reference import pages

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_pages_are_current():
    for name, text in pages().items():
        written = (DOCS / name).read_text(encoding="utf-8")
        assert written == text, "run: python -m rlcm_fast.config.reference docs"


def test_every_field_has_a_row_with_its_default_and_range():
    page = "\n".join(pages().values())
    hints = get_type_hints(Config)
    for item in fields(Config):
        if is_dataclass(hints[item.name]):
            assert f"## `{item.name}`" in page
            for field in fields(hints[item.name]):
                assert f"| `{field.name}` |" in page
        else:
            assert f"| `{item.name}` |" in page
    assert "| `clip_range` | a number in (0, 1), as 1e-4 | `0.0001` |" in page
    assert "| `num_iterations` | whole number: 1 or more; at most 1,000,000,000 | `100` |" in page
    assert "| `name` | text | required |" in page
