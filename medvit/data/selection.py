"""Which volume stands for a study: one visible rule, and for each volume passed over the reason.

A study often holds several reconstructions of one acquisition, and one series may hold several volumes (phases,
kernels). A label of the study means one of them, and taking all would count a patient twice. `CRITERIA` is the rule,
in its order: axial; no reformat or projection; more slices; thinner slices; larger matrix; lower UID.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from medvit.io import Series

DERIVED = re.compile(r"(?<![a-z])(mip|minip|mpr|vrt|reformat\w*|projection)(?![a-z])", re.IGNORECASE)
"""Words of a SeriesDescription that name what was computed from another series."""


class Criterion(NamedTuple):
    """One step of the rule: what speaks for the chosen volume, its rank (lower is better), and the figure shown."""

    words: str
    rank: Callable[[Series], Any]
    shown: Callable[[Series], str] = lambda _: ""


def thickness_mm(series: Series) -> float:
    """Slice thickness, else the slice distance; infinite where neither is known."""
    return series.header.slice_thickness_mm or series.spacing_mm[2] or math.inf


CRITERIA = (
    Criterion("it is axial", lambda s: not s.axial),
    Criterion("it is no reformat or projection", lambda s: bool(DERIVED.search(s.header.description))),
    Criterion("more slices", lambda s: -s.shape[0], lambda s: f"{s.shape[0]}"),
    Criterion("thinner slices", thickness_mm, lambda s: f"{thickness_mm(s):g} mm"),
    Criterion("larger matrix", lambda s: -s.shape[1] * s.shape[2], lambda s: f"{s.shape[1]} x {s.shape[2]}"),
    Criterion("all else is equal, and its UID or place comes first", lambda s: (s.uid, s.part)),
)
"""The rule: the first criterion on which two volumes differ decides."""


@dataclass(frozen=True)
class NotSelected:
    """A usable volume that is not a case, and why not: which criterion decided, with both figures."""

    series: Series
    detail: str


def select_series(
    candidates: Iterable[Series], same: Callable[[Series], Hashable] | None = None
) -> tuple[tuple[Series, ...], tuple[NotSelected, ...]]:
    """The best volume of each study by `CRITERIA`, and the others with the criterion that decided.

    Args:
        candidates: in any order; it does not matter.
        same: which volumes compete; None: those of one study (without a study UID, those of one series).
    """
    rivals: dict[Hashable, list[Series]] = defaultdict(list)
    for series in candidates:
        rivals[same(series) if same else series.study_uid or series.uid].append(series)
    chosen, others = [], []
    for members in rivals.values():
        best, *rest = sorted(members, key=lambda s: tuple(criterion.rank(s) for criterion in CRITERIA))
        chosen.append(best)
        others += [NotSelected(other, _why(best, other)) for other in rest]
    return tuple(chosen), tuple(others)


def _why(best: Series, other: Series) -> str:
    decisive = next(step for step in CRITERIA if step is CRITERIA[-1] or step.rank(best) != step.rank(other))
    figures = (decisive.shown(best), decisive.shown(other))
    what = "another volume of this series" if best.uid == other.uid else "another series of this study"
    return f"{what} was chosen: {decisive.words}" + (f" ({figures[0]} against {figures[1]})" if all(figures) else "")
