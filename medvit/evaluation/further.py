"""What a report can say beyond its figures, where there is a model and not only its predictions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports of anybody's predictions start without torch
    from medvit.evaluation.curves import Robustness
    from medvit.evaluation.decision import Cost, Gain, Latency
    from medvit.evaluation.drift import Drift
    from medvit.evaluation.explanation import Explanation


@dataclass(frozen=True, kw_only=True)
class Further:
    """Each part is None where it was not asked for or cannot be known; `report.html` then says how to get it.

    Attributes:
        explanation: what the model looked at.
        robustness: AUROC on pictures made worse.
        drift: whether these cases as a whole are like those that the model knows.
        gain: over a named baseline.
        latency: of a prediction.
        cost: of ownership.
    """

    explanation: Explanation | None = None
    robustness: Robustness | None = None
    drift: Drift | None = None
    gain: Gain | None = None
    latency: Latency | None = None
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """For metrics.json: without pictures."""
        parts = {name: asdict(part) for name, part in vars(self).items() if part is not None}
        for part in parts.values():
            part.pop("pictures", None)
        return parts
