"""Report and picture of an answer, as bytes: a pure function, so that another process can do it.

highdicom and pydicom are Python: in a thread they would keep the model from the interpreter's lock for longer than a
small model needs for the study. What is imported here starts fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from medvit.io import (
    Composed,
    ResultContext,
    Series,
    Source,
    check_unchanged,
    compose_sc,
    compose_sr,
    deciding_slices,
    open_source,
)
from medvit.records import Prediction


class Version(NamedTuple):
    """Which report of a study it is.

    Attributes:
        digest: of what it says, time and predecessor apart.
        made: its time, ISO 8601.
        predecessor: UID of the report whose place it takes.
        uid: its own.
    """

    digest: str = ""
    made: str = ""
    predecessor: str = ""
    uid: str = ""


@dataclass(frozen=True)
class Order:
    """What is to be composed.

    Attributes:
        series: as it was listed.
        as_stored: the model saw its slices as stored.
        prediction: of the series.
        row: the row of predictions.csv.
        rgb: picture of slice `number`; None: no picture.
        number: see `rgb`.
        context: of results; its time is replaced.
        before: the last report of the study.
        now: the time of a new one, ISO 8601.
    """

    series: Series
    as_stored: bool
    prediction: Prediction
    row: Mapping[str, Any]
    rgb: npt.NDArray[np.uint8] | None
    number: int
    context: ResultContext
    before: Version
    now: str


class Documents(NamedTuple):
    """Report and picture, and which version they are."""

    report: Composed
    picture: Composed | None
    version: Version


def compose(order: Order) -> Documents:
    """Report and picture of an order.

    The same answer to the same images is the report that there was, to the byte; another one takes its place.

    Raises:
        ScanError: the series cannot be used, has changed since it was listed, or belongs to no study.
    """
    paths = [order.series.root / name for name in order.series.files]
    source = open_source(paths, part=order.series.part, as_stored=order.as_stored)
    check_unchanged(order.series)
    digest, before = _digest(order, source), order.before
    if digest != before.digest:
        # without identity UIDs are not those of the objects in the PACS, and nothing there is replaced
        predecessor = "" if order.context.pseudonym else before.uid
        before = Version(digest, order.now, predecessor)
    content = f"{digest} {before.predecessor}".strip()
    context = replace(order.context, now=datetime.fromisoformat(before.made), content=content)
    report = compose_sr(order.prediction, source, context, predecessor=before.predecessor)
    picture = None if order.rgb is None else compose_sc(order.rgb, order.number, source, context)
    return Documents(report, picture, before._replace(uid=report.name.removesuffix(".dcm")))


def _digest(order: Order, source: Source) -> str:
    """Hash of all that report and picture say, time and predecessor apart."""
    said = {
        "row": order.row,
        "slices": deciding_slices(order.prediction),
        "identity": {keyword: raw.hex() for keyword, raw in source.identity.items()},
        "picture": None if order.rgb is None else [order.number, hashlib.sha256(order.rgb.tobytes()).hexdigest()],
        "version": order.context.model_version,
    }
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
