"""By what groups are compared: site, sex, age band, any further column of the predictions, and two of them crossed."""

from __future__ import annotations

import pandas as pd

from medvit.config import EvaluationConfig
from medvit.records import IDENTIFIERS, OPTIONAL

STANDARD = ("site", "sex", "age_band")
AGE_EDGES = (0, 18, 40, 60, 80, 131)
AGE_BANDS = ("0–17", "18–39", "40–59", "60–79", "80+")

MOST_GROUPS = 24
"""Of a standard attribute: more sites than these are one group, or time and memory would go with their square."""

MOST_VALUES = 12
"""A column with more distinct values is taken for a measurement, not for groups."""


def age_band(age: pd.Series) -> pd.Series:
    """Age in years -> "0–17", "18–39", "40–59", "60–79", "80+"; "" where missing or outside 0..130."""
    return pd.cut(age, AGE_EDGES, right=False, labels=AGE_BANDS).astype(object).fillna("")


def crossed(frame: pd.DataFrame, first: str, second: str) -> pd.Series:
    """Both values of each case, "North, F"; "" where one of them is missing."""
    one, other = (frame[name].fillna("").astype(str) for name in (first, second))
    return (one + ", " + other).where((one != "") & (other != ""), "")


def with_attributes(frame: pd.DataFrame, settings: EvaluationConfig) -> tuple[pd.DataFrame, tuple[str, ...], list[str]]:
    """What to compare groups by.

    Returns:
        The frame with derived columns (`age_band`, crossings such as `site_by_sex`), the columns to compare by, and
        notes on what could not be compared.
    """
    refused = _derived(pd.DataFrame(frame.attrs.get("refused", []), columns=list(frame.columns)))
    frame = _derived(frame)
    further = [str(name) for name in frame.columns if not _is_known(str(name))]
    groups = [name for name in further if 2 <= frame[name].nunique() <= MOST_VALUES]
    notes = [
        f"Column `{name}` has {frame[name].nunique()} values: no groups to compare."
        for name in further
        if name not in groups and settings.attributes is None
    ]
    wanted = list(dict.fromkeys([*STANDARD, *groups])) if settings.attributes is None else list(settings.attributes)
    notes += [f"No column `{name}`: no comparison by it." for name in wanted if name not in frame]
    chosen = [name for name in wanted if name in frame]
    for name in (name for name in STANDARD if name in chosen):
        if frame[name].nunique() > MOST_GROUPS:
            notes.append(_pool(name, frame, refused))
    pairs = [pair for pair in settings.crossings if all(_several(frame, name) for name in pair)]
    for first, second in pairs:
        for side in (frame, refused):
            side[f"{first}_by_{second}"] = crossed(side, first, second)
        chosen.append(f"{first}_by_{second}")
    frame.attrs["refused"] = refused.to_dict("records")
    return frame, tuple(chosen), notes


def _pool(name: str, frame: pd.DataFrame, refused: pd.DataFrame) -> str:
    """Make one group of all but the most frequent ones, in both frames; a note that says so."""
    counts = frame[name][frame[name] != ""].value_counts()
    kept, rest = set(counts.index[: MOST_GROUPS - 1]), len(counts) - MOST_GROUPS + 1
    for side in (frame, refused):
        side[name] = side[name].where(side[name].isin(kept) | (side[name] == ""), f"other ({rest})")
    return f"Column `{name}` has {len(counts)} values: all but the {MOST_GROUPS - 1} most frequent are one group."


def _derived(frame: pd.DataFrame) -> pd.DataFrame:
    """A copy with `age_band` where there is an age, and with further columns in one spelling."""
    frame = frame.copy()
    if "age" in frame:
        frame["age_band"] = age_band(pd.to_numeric(frame["age"], errors="coerce"))
    for name in frame.columns:
        if not _is_known(str(name)):
            frame[name] = _numbers_alike(frame[name])
    return frame


def _numbers_alike(values: pd.Series) -> pd.Series:
    """A column of numbers spelled in one way ("5.000000" and "005.0E+00" are "5"); any other as it is."""
    given = values.fillna("").astype(str)
    numbers = pd.to_numeric(given.where(given != ""), errors="coerce")
    if not (numbers.notna() | (given == "")).all():
        return values
    return numbers.map(lambda number: "" if number != number else f"{number:g}")  # noqa: PLR0124 - NaN is not itself


def _several(frame: pd.DataFrame, name: str) -> bool:
    return name in frame and frame[name].replace("", pd.NA).nunique() > 1


def _is_known(column: str) -> bool:
    return column.startswith("p_") or column in (*IDENTIFIERS, *OPTIONAL, *STANDARD)
