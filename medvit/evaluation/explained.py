"""What is known of a model's relevance maps, as records: a report shows them without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from medvit.evaluation.metrics import Interval

PREFERRED: tuple[Literal["gradient", "rollout", "attention"], ...] = ("gradient", "rollout", "attention")
"""The first knows the class, the second all blocks."""


@dataclass(frozen=True, kw_only=True)
class Faithfulness:
    """How good a map is, over cases.

    Attributes:
        deletion: mean area; `insertion` too.
        over_random: insertion less deletion, less that of random order: mean over cases; `over_centre` likewise.
    """

    deletion: float
    insertion: float
    over_random: Interval
    over_centre: Interval

    @property
    def beats_both(self) -> bool:
        """Whether both intervals lie above 0."""
        return bool(self.over_random.low > 0 and self.over_centre.low > 0)


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A slice as it is and with what spoke for a class.

    Attributes:
        case_id: pseudonym, as in predictions.csv.
        kind: "right call", "false alarm", "missed"; "wrong call" with more than two classes.
        target: class that is explained, and its `probability`.
        label: true class.
        slice_number: 1 is the first of `slices` in the series as medvit orders it (feet to head).
        weight: how much the slice counted, 0..1.
        png: two panels side by side.
    """

    case_id: str
    kind: str
    target: str
    probability: float
    label: str
    slice_number: int
    slices: int
    weight: float
    png: bytes


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """Of the held-out cases of a run.

    Attributes:
        maps: name -> how good it is, the rival "centre" among them; empty where nothing could be said.
        cases: on which maps were judged, of `available` ones, in `seconds` with at most `slices` slices each.
        pictures: with the map that is `shown`; where none is, with gradient rollout.
        note: why there is less than asked for; empty.
    """

    maps: dict[str, Faithfulness] = field(default_factory=dict)
    cases: int = 0
    available: int = 0
    slices: int = 0
    seconds: float = 0.0
    pictures: tuple[Picture, ...] = ()
    note: str = ""

    @property
    def shown(self) -> str:
        """The map that is shown: the first of gradient rollout, rollout and attention that beats both rivals, or ""."""
        return next((name for name in PREFERRED if name in self.maps and self.maps[name].beats_both), "")
