"""predictions.csv, written for anybody: DESIGN section 4 has its columns.

Text that a spreadsheet would run as a formula gets a leading quote, which `read_predictions` takes off again. Text is
UTF-8, with a byte order mark where it goes beyond ASCII: Excel takes it for its own code page else.
"""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd

from medvit.evaluation.predictions import FORMULA_STARTS, read_cell
from medvit.io.disk import write_pieces
from medvit.records import OPTIONAL, Prediction

Row = Mapping[Any, Any]
"""Column -> value."""


def write_predictions(predictions: Sequence[Prediction] | pd.DataFrame, path: str | Path) -> None:
    """Write predictions.csv, all or nothing."""
    if isinstance(predictions, pd.DataFrame):
        rows: list[Row] = list(predictions.to_dict("records"))
    else:
        rows = [prediction.to_row() for prediction in predictions]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_pieces(path, predictions_csv(lambda: rows))


def predictions_csv(rows: Callable[[], Iterable[Row]], columns: Iterable[str] = ()) -> Iterator[bytes]:
    """The text of predictions.csv, a row at a time: contract column order, optional columns only where known.

    Args:
        rows: called anew for what columns there are and for what is in them: they need not be in memory together.
        columns: which there are in any case, but for the optional ones.
    """
    seen = {name: None for name in columns if name not in OPTIONAL}
    for row in rows():
        seen |= {name: None for name, value in row.items() if name not in OPTIONAL or read_cell(value)}
    order = [name for name in _contract(seen) if name in seen]
    order += [name for name in seen if name not in order]
    return table_csv(order, lambda: ([_shown(name, row.get(name)) for name in order] for row in rows()))


def table_csv(header: Sequence[object], rows: Callable[[], Iterable[Sequence[object]]]) -> Iterator[bytes]:
    """A CSV that no spreadsheet misreads or runs, a row at a time; `rows` is called twice."""
    ascii_alone = all(str(value).isascii() for row in chain([header], rows()) for value in row)
    yield b"" if ascii_alone else codecs.BOM_UTF8
    for row in chain([header], rows()):
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(map(_safe, row))
        yield text.getvalue().encode()


def _contract(seen: Iterable[Any]) -> list[Any]:
    probabilities = [name for name in seen if str(name).startswith("p_")]
    return ["case_id", "patient_id", "label", *probabilities, "predicted", "site", "sex", "age", *OPTIONAL]


def _shown(name: object, value: object) -> object:
    """Empty where nothing is known; the number of a fold is whole, though pandas made it none beside missing ones."""
    text = read_cell(value)
    return text.removesuffix(".0") if name == "fold" else value if text else ""


def _safe(value: object) -> object:
    """A cell that no spreadsheet runs."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA_STARTS) else value
