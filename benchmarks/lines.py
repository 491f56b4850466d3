"""Finished runs as lines of JSON, so that a benchmark that was interrupted goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What is there; a line that was cut off is not."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


def add_line(path: Path, row: Mapping[str, Any]) -> None:
    """Keep a run; its line begins anew whatever was cut off before."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{json.dumps(row)}")
