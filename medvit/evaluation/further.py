"""What a report can say beyond its figures, where there is a model and not only its predictions.

Kept beside the report of a run, so that a second report on the same predictions says as much as the first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from medvit.evaluation.curves import Robustness
from medvit.evaluation.decision import Cost, Gain, Latency
from medvit.evaluation.drift import Drift
from medvit.evaluation.explained import Explanation
from medvit.evaluation.learning_curve import Learning
from medvit.records import UsageError

FILE = "further.json"
"""In a report's folder. Holds pictures of patients where the report does."""


@dataclass(frozen=True, kw_only=True)
class Further:
    """Each part is None where it was not asked for or cannot be known.

    Attributes:
        learning: how training went, one of each fold; empty where it is not known.
        explanation: what the model looked at.
        robustness: AUROC on pictures made worse.
        drift: whether these cases as a whole are like those that the model knows.
        gain: over a named baseline.
        latency: of a prediction.
        cost: of ownership.
    """

    __pydantic_config__ = ConfigDict(ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="constants")

    learning: tuple[Learning, ...] = ()
    explanation: Explanation | None = None
    robustness: Robustness | None = None
    drift: Drift | None = None
    gain: Gain | None = None
    latency: Latency | None = None
    cost: Cost | None = None

    def to_json(self) -> dict[str, Any]:
        """For metrics.json: without pictures."""
        parts = {name: part for name, part in asdict(self).items() if part}
        if "explanation" in parts:
            del parts["explanation"]["pictures"]
        return parts


_ADAPTER = TypeAdapter(Further)


def save_further(further: Further, folder: Path) -> None:
    """Keep it, pictures and all, beside a report."""
    (folder / FILE).write_bytes(_ADAPTER.dump_json(further))


def load_further(folder: Path) -> Further:
    """What was kept beside the report in a folder; nothing where nothing was.

    Raises:
        UsageError: the file is damaged or of another version.
    """
    path = folder / FILE
    if not path.is_file():
        return Further()
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except ValidationError:
        raise UsageError(
            f"{path}: damaged, or written by another version of medvit. Delete it: the report then says less."
        ) from None
