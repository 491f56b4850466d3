"""Figures as JSON can hold them."""

from __future__ import annotations

import math
from typing import Any


def without_nan(value: Any) -> Any:
    """JSON has no NaN: undefined becomes null."""
    match value:
        case dict():
            return {key: without_nan(item) for key, item in value.items()}
        case list() | tuple():
            return [without_nan(item) for item in value]
        case float() if math.isnan(value):
            return None
        case _:
            return value
