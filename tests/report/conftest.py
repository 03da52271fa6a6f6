"""Pages whose charts are empty, because matplotlib takes half a second for a page."""

from __future__ import annotations

import pytest
from markupsafe import Markup, escape

from rlcm_fast.report import page


@pytest.fixture
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts an empty picture in the place of each chart."""
    monkeypatch.setattr(page, "draw", lambda _, label: Markup(f'<svg role="img" aria-label="{escape(label)}"></svg>'))
