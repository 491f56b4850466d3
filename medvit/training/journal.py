"""Rows of metrics, one per epoch, for programs (JSON lines) and for eyes (TensorBoard).

TensorBoard's own writer works in a thread, whose failure on a full disk is a hang or somebody else's traceback: events
are written here, at once, by the loop itself. Both files hold what the history holds, also after a resume.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from medvit.io.disk import append, write_whole

Row = dict[str, Any]


def write_metrics(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object per line; what is not finite is null, for JSON has no other word for it.

    Raises:
        DiskFullError: no room; what was there is as it was.
    """
    lines = []
    for row in rows:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        lines.append(json.dumps(finite, allow_nan=False) + "\n")
    write_whole(path, "".join(lines).encode())


class Board:
    """TensorBoard events of a fit: in the place of those that an interrupted one has left.

    Args:
        folder: made when needed.
        rows: of epochs that are done.

    Raises:
        DiskFullError: no room.
    """

    def __init__(self, folder: Path, rows: Iterable[Row] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.path = folder / f"events.out.tfevents.{time.time_ns()}"
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        """Append the figures of an epoch.

        Raises:
            DiskFullError: no room.
        """
        figures = [Summary.Value(tag=k, simple_value=v) for k, v in row.items() if isinstance(v, float)]
        self._append(Event(wall_time=time.time(), step=row["epoch"], summary=Summary(value=figures)))

    def _append(self, event: Any) -> None:
        record = BytesIO()
        RecordWriter(record).write(event.SerializeToString())
        append(self.path, record.getvalue())
