"""JSON that every reader accepts: NaN and infinities become null, because JSON has no word for them.

What others have written is read by `load_json`, which knows one error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def load_json(text: str | bytes) -> Any:
    """Returns what JSON holds; raises ValueError in one line, for brackets without an end as well."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # also of bytes that are no text, and of numbers of 5,000 digits
        raise ValueError(f"is no JSON ({' '.join(str(error).split())[:200]})") from error


def is_number(value: Any) -> bool:
    """Tells whether a value of JSON is a number that a float can hold, neither NaN nor infinite."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        return False


def not_finite(values: Mapping[str, Any]) -> list[str]:
    """Lists the keys whose value is NaN or infinite."""
    return [key for key, value in values.items() if isinstance(value, float) and not math.isfinite(value)]


def finite_json(value: Any, indent: int | None = None) -> str:
    """Returns `value` as JSON with null in place of every number that is NaN or infinite, at any depth."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
