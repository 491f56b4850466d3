"""A figure and the range that it must lie in, for benchmarks whose figures can be too high as well as too low."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """One figure and its range, both ends included."""

    what: str
    figure: float
    low: float
    high: float

    @property
    def met(self) -> bool:
        """Never with NaN."""
        return bool(self.low <= self.figure <= self.high)
