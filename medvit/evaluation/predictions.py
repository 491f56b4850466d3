"""predictions.csv: read from anybody, checked.

The contract is DESIGN section 4. Identifiers and class names are text ("0" and "1" stay text). Everything that was
assumed or left out on the way is recorded in `frame.attrs["notes"]`, and the report prints it. Errors name data rows by
number, never by identifier.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medvit.evaluation.metrics import Bools, Floats
from medvit.records import ReasonCode, UsageError

NUMBERS = ("age", "threshold", "spread", "ood_score")
SUM_TOLERANCE = 0.01
"""Probabilities may miss a sum of 1 by this much: people round to two decimals."""

REFUSED = str(ReasonCode.NOT_FOR_MODEL)
"""In `flags` of a row without probabilities: a case that the model would not judge."""

NOTHING = ("", "na", "n/a", "none", "null", "-")
"""How people write that there is no number."""

NUMBERED = "row "
"""Begins a case_id or patient_id that no table gave: it says nothing about other tables."""

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
"""A spreadsheet would execute a cell that begins so (OWASP, CSV injection)."""


@dataclass(frozen=True)
class OneVsRest:
    """Labelled cases as binary questions: C = 1 (the last class) for two classes, else C = K.

    Attributes:
        names: C class names, the positive class of each question.
        truth: (n, C) the case is of that class.
        called: (n, C) the case was predicted to be.
        score: (n, C) its probability.
    """

    names: tuple[str, ...]
    truth: Bools
    called: Bools
    score: Floats


def class_names(frame: pd.DataFrame) -> tuple[str, ...]:
    """Classes in column order: the last of two is the positive one."""
    return tuple(str(column)[2:] for column in frame.columns if str(column).startswith("p_"))


def one_vs_rest(frame: pd.DataFrame) -> OneVsRest:
    """The arrays that the figures are computed from, all in the frame's row order."""
    classes = class_names(frame)
    names = classes if len(classes) > 2 else classes[-1:]
    label, predicted = frame["label"].to_numpy(dtype=object), frame["predicted"].to_numpy(dtype=object)
    return OneVsRest(
        names=names,
        truth=np.stack([label == name for name in names], axis=1),
        called=np.stack([predicted == name for name in names], axis=1),
        score=frame[[f"p_{name}" for name in names]].to_numpy(dtype=np.float64),
    )


def read_predictions(path: str | Path) -> pd.DataFrame:
    """Read and check a predictions.csv.

    Raises:
        UsageError: the file cannot be read as a UTF-8 CSV, or `check_predictions` refuses it.
    """
    name = Path(path).name
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as stream:
            (header, *rows) = (row for row in csv.reader(stream) if any(row))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        why = f"{type(error).__name__}: {error}" if isinstance(error, csv.Error) else type(error).__name__
        raise UsageError(
            f"{name}: not readable as a CSV ({why}). Give a comma-separated UTF-8 table with header."
        ) from None
    wide = [number for number, row in enumerate(rows, 1) if any(cell.strip() for cell in row[len(header) :])]
    if wide and (len(header) > 1 or ";" not in header[0]):  # taken as they stand, every column would be another's
        raise UsageError(
            f"{name}: {len(wide)} rows have more cells than the header, first data row {wide[0]}. Put quotes around "
            "commas, or name every column."
        )
    cells = [(row + [""] * len(header))[: len(header)] for row in rows]
    return check_predictions(pd.DataFrame(cells, columns=header, dtype=object), name)


def check_predictions(frame: pd.DataFrame, name: str = "predictions") -> pd.DataFrame:
    """A copy with every column the report needs, labelled and scored rows only.

    `attrs["notes"]` says what was assumed, `attrs["refused"]` holds the rows that the model refused.

    Args:
        frame: columns of predictions.csv; `label` and `p_<class>` are required, the rest has a stated default.
        name: of the source, for errors.

    Raises:
        UsageError: columns missing, labels that are no class, probabilities that are none, case_id repeated, no labels.
    """
    notes = list(frame.attrs.get("notes", ()))
    frame = frame.rename(columns=lambda column: str(column).strip())
    if nameless := int((frame.columns == "").sum()):  # an index, or what a spreadsheet leaves at the end
        frame = frame.loc[:, frame.columns != ""]
        notes.append(f"{nameless} columns have no name and were left out.")
    if twice := sorted(set(frame.columns[frame.columns.duplicated()])):
        raise UsageError(f"{name}: columns {', '.join(twice)} are there twice. Keep one of each.")
    for column in frame.columns:
        if not column.startswith("p_") and column not in NUMBERS:
            frame[column] = frame[column].map(read_cell).astype(object)
    frame = _complement(frame)
    _require_columns(frame, name)
    labelled = frame["label"] != ""
    if not labelled.any():
        raise UsageError(f"{name}: none of {len(frame)} rows has a label; evaluation needs known labels. Fill `label`.")
    if not labelled.all():
        notes.append(f"{(~labelled).sum()} of {len(frame)} rows have no label and were set aside.")
    frame = frame[labelled].copy()
    refused = _refused(frame)
    if refused.all():
        raise UsageError(f"{name}: the model refused all {len(frame)} labelled cases ({REFUSED}): nothing to judge.")
    if refused.any():
        notes.append(f"{refused.sum()} of {len(frame)} cases were refused by the model ({REFUSED}) and have no score.")
    turned_away = frame[refused].to_dict("records")
    frame = _check_probabilities(frame[~refused].copy(), name)
    for column in NUMBERS:
        if column in frame:
            notes += _read_numbers(frame, column, name)
    _check_classes(frame, "label", name)
    notes += _fill_identifiers(frame, name)
    notes += _fill_predicted(frame)
    _check_classes(frame, "predicted", name)
    frame = frame.reset_index(drop=True)
    frame.attrs |= {"notes": notes, "refused": turned_away}
    return frame


def read_cell(value: object) -> str:
    """Text of a cell, "" where missing; without the quote that keeps spreadsheets from running it."""
    if value is None or value is pd.NA or value != value:  # noqa: PLR0124 - NaN is not itself
        return ""
    text = str(value)
    if text.startswith("'") and text[1:].startswith(FORMULA_STARTS):
        text = text[1:]
    text = text.strip()
    return "" if text in ("nan", "NaN") else text


def _refused(frame: pd.DataFrame) -> pd.Series:
    """Rows without a score because the model refused them."""
    if "flags" not in frame:
        return pd.Series(False, index=frame.index)
    empty = (frame[[f"p_{c}" for c in class_names(frame)]].map(read_cell) == "").all(axis=1)
    return empty & np.array([REFUSED in str(flags).split() for flags in frame["flags"]], dtype=bool)


def _complement(frame: pd.DataFrame) -> pd.DataFrame:
    """Labels 0/1 with p_1 alone: p_0 is what is missing to 1."""
    if class_names(frame) != ("1",):
        return frame
    frame.insert(0, "p_0", 1 - pd.to_numeric(frame["p_1"], errors="coerce"))
    return frame


def _require_columns(frame: pd.DataFrame, name: str) -> None:
    classes = class_names(frame)
    if "label" not in frame or len(classes) < 2:
        seen = ", ".join(map(str, frame.columns)) or "nothing"
        separator = " Is it separated by semicolons? Use commas." if ";" in seen else ""
        raise UsageError(
            f"{name}: needs a column `label` and one column `p_<class>` per class, two or more "
            f"(or `p_1` alone with labels 0/1); saw {seen}.{separator}"
        )


def _check_probabilities(frame: pd.DataFrame, name: str) -> pd.DataFrame:
    columns = [f"p_{c}" for c in class_names(frame)]
    values = frame[columns].apply(pd.to_numeric, errors="coerce").astype(np.float64)
    matrix = values.to_numpy()
    bad = ~((matrix >= 0) & (matrix <= 1)).all(axis=1) | (np.abs(matrix.sum(axis=1) - 1) > SUM_TOLERANCE + 1e-9)
    if bad.any():
        first = bad.tolist().index(True)
        raise UsageError(
            f"{name}: {bad.sum()} rows where {', '.join(columns)} are not probabilities (each 0..1, sum 1), first in "
            f"data row {frame.index[first] + 1}: {', '.join(map(str, matrix[first]))}. Apply a softmax, and rename p_ "
            "columns that are something else."
        )
    frame[columns] = values
    return frame


def _read_numbers(frame: pd.DataFrame, column: str, name: str) -> list[str]:
    """Make a column numbers, NaN where empty; what is no number decides nothing, so that a threshold must be one."""
    numbers = pd.to_numeric(frame[column], errors="coerce").astype(np.float64)
    strange = np.isnan(numbers) & ~frame[column].map(read_cell).str.lower().isin(NOTHING)
    if strange.any() and column == "threshold" and len(class_names(frame)) == 2:
        raise UsageError(
            f"{name}: `threshold` has {frame[column][strange].iloc[0]!r}, which is no number (decimal point?), in "
            f"{strange.sum()} rows. Correct it, or leave it empty."
        )
    frame[column] = numbers
    return [f"{strange.sum()} cells of `{column}` are no numbers and count as not given."] if strange.any() else []


def _check_classes(frame: pd.DataFrame, column: str, name: str) -> None:
    classes = class_names(frame)
    # pandas writes 0/1 beside missing values as 0.0/1.0
    frame[column] = frame[column].map(lambda value: value if value in classes else value.removesuffix(".0"))
    unknown = sorted(set(frame[column]) - set(classes))
    if unknown:
        raise UsageError(
            f"{name}: `{column}` has {', '.join(map(repr, unknown[:5]))}, but the p_ columns name "
            f"{', '.join(map(repr, classes))}. Make them the same text (case counts)."
        )


def _fill_identifiers(frame: pd.DataFrame, name: str) -> list[str]:
    notes = []
    rows = frame.index.astype(str)
    if "case_id" not in frame:
        frame["case_id"] = NUMBERED + rows
        notes.append("No case_id column: rows were numbered.")
    if (nameless := (frame["case_id"] == "").to_numpy()).any():
        frame.loc[nameless, "case_id"] = NUMBERED + rows[nameless]
        notes.append(f"{nameless.sum()} of {len(frame)} rows have no case_id: they were numbered.")
    twice = frame["case_id"].duplicated()
    if twice.any():
        first = twice.tolist().index(True)
        raise UsageError(
            f"{name}: {twice.sum()} rows repeat a case_id, first in data row {frame.index[first] + 1}. "
            "Give each case one row."
        )
    missing = (frame["patient_id"] == "") if "patient_id" in frame else pd.Series(True, index=frame.index)
    if missing.any():
        frame.loc[missing, "patient_id"] = NUMBERED + rows[missing.to_numpy()]
        notes.append(
            f"{missing.sum()} of {len(frame)} cases have no patient_id: each counts as a patient of its own. "
            "If patients have several cases, the intervals are too narrow."
        )
    return notes


def _fill_predicted(frame: pd.DataFrame) -> list[str]:
    classes = np.array(class_names(frame), dtype=object)
    matrix = frame[[f"p_{c}" for c in classes]].to_numpy(dtype=np.float64)
    threshold = frame["threshold"].to_numpy() if "threshold" in frame else np.full(len(frame), np.nan)
    decided = ~np.isnan(threshold) & (len(classes) == 2)
    at_threshold = classes[(matrix[:, -1] >= threshold).astype(int)]
    derived = np.where(decided, at_threshold, classes[matrix.argmax(axis=1)])
    given = frame["predicted"].to_numpy() != "" if "predicted" in frame else np.zeros(len(frame), dtype=bool)
    contradicted = int((given & decided & (frame.get("predicted", "") != derived)).sum())
    if not given.all():
        frame.loc[~given, "predicted"] = derived[~given]
    notes = []
    if not (given | decided).all():
        notes.append("No threshold was given: the most probable class was predicted (0.5 for two classes).")
    if len(classes) == 2 and (given & ~decided).any():
        notes.append("`predicted` was taken as given; the threshold behind it is not recorded.")
    if contradicted:
        notes.append(f"{contradicted} cases: `predicted` contradicts the threshold; `predicted` was used.")
    return notes
