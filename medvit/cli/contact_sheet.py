"""The middle slice of each series on one sheet: a look at a folder before anything is trained on it.

A tile tells how the series was scanned and what was found; nothing on it names a patient, a site or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medvit import io
from medvit.cli.listing import Row, printable
from medvit.records import WINDOWS, Scan, ScanError

MOST_TILES = 60
"""What fits on a screen, and can be read in a minute or two."""

HEADS = ("HEAD", "BRAIN", "SKULL")
"""BodyPartExamined (PS3.16 annex L) that is looked at in the brain window."""

SHEET_INCHES, LEAST_TILE_INCHES, MOST_TILE_INCHES, CAPTION_INCHES = 10.0, 2.0, 5.0, 0.62
PALE, RED, AMBER = "#d8d8d8", "#ff6b5e", "#f0b840"


@dataclass(frozen=True)
class Sheet:
    """What was drawn. `failed` are series whose headers were fine and whose pixels were not."""

    drawn: int
    left_out: int
    failed: tuple[tuple[Row, ScanError], ...]


def draw_sheet(rows: Sequence[Row], path: Path, progress: Callable[[], None] = lambda: None) -> Sheet:
    """Write a PNG of the middle slices of the first `MOST_TILES` series.

    Args:
        rows: usable series, one or more.
        path: the PNG.
        progress: called after each series.
    """
    tiles, failed = rows[:MOST_TILES], []
    figure, axes = _grid(len(tiles))
    for row, axis in zip(tiles, axes, strict=False):
        try:
            _draw_tile(axis, row, io.read(row.series))
        except ScanError as error:
            failed.append((row, error))
            _draw_failure(axis, row, error)
        progress()
    left_out = len(rows) - len(tiles)
    figure.text(0.5, 0.01, _footer(len(tiles), left_out), color=PALE, fontsize=7, ha="center", va="bottom")
    figure.savefig(path, format="png", dpi=120, facecolor="black", metadata={"Software": None})
    return Sheet(len(tiles), left_out, tuple(failed))


def middle_slice(scan: Scan) -> tuple[npt.NDArray[np.float32], float]:
    """HU of the middle slice in the plane of acquisition, as radiologists look at it, and height / width of a pixel.

    Axial: front of the patient up, patient's left to the right of the picture. Coronal and sagittal: head up.
    """
    patient_axis = int(np.abs(scan.affine[:3, 2]).argmax())  # L, P or S: along which the slices were stacked
    oriented = io.reorient_lps(scan)
    x_mm, y_mm, z_mm = oriented.spacing_mm
    axis = 2 - patient_axis
    plane = oriented.hu.take(oriented.hu.shape[axis] // 2, axis=axis)
    if patient_axis == 2:
        return plane, y_mm / x_mm
    return plane[::-1], z_mm / (x_mm if patient_axis == 1 else y_mm)


def window_of(body_part: str) -> str:
    """Name of the window in `records.WINDOWS` that shows this body part."""
    return "brain" if any(head in body_part.upper() for head in HEADS) else "soft_tissue"


def _grid(tiles: int) -> tuple[Figure, list[Axes]]:
    across = min(tiles, 10, math.ceil(math.sqrt(1.6 * tiles)))
    down = math.ceil(tiles / across)
    tile = min(max(SHEET_INCHES / across, LEAST_TILE_INCHES), MOST_TILE_INCHES)
    width, height = across * tile, down * (tile + CAPTION_INCHES) + 0.3
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(down, across, squeeze=False)
    figure.subplots_adjust(0.01, 0.3 / height, 0.99, 1 - CAPTION_INCHES / height, 0.05, CAPTION_INCHES / tile)
    for axis in axes.flat:
        axis.set_axis_off()
    return figure, list(axes.flat)


def _draw_tile(axis: Axes, row: Row, scan: Scan) -> None:
    pixels, aspect = middle_slice(scan)
    level, width = WINDOWS[window_of(scan.header.body_part)]
    axis.imshow(pixels, cmap="gray", vmin=level - width / 2, vmax=level + width / 2, aspect=aspect)
    slices = "1 slice" if len(scan.hu) == 1 else f"{len(scan.hu)} slices"
    spacing = "×".join(f"{value:.3g}" for value in scan.spacing_mm)
    codes = " ".join(dict.fromkeys([*row.series.codes, *scan.codes]))
    _caption(axis, row, f"{slices}, {spacing} mm", codes, AMBER)


def _draw_failure(axis: Axes, row: Row, error: ScanError) -> None:
    axis.text(0.5, 0.5, error.code, color=RED, fontsize=9, ha="center", va="center", transform=axis.transAxes)
    _caption(axis, row, "not readable", "", RED)


def _caption(axis: Axes, row: Row, volume: str, codes: str, colour: str) -> None:
    kernel = f"  {printable(row.series.header.kernel)[:20]}" if row.series.header.kernel else ""
    head = f"{row.number}{kernel}{'' if row.chosen else '  (not chosen)'}"
    lines = [(head, PALE), (volume, PALE), (codes if len(codes) <= 34 else codes[:33] + "…", colour)]
    for place, (text, shade) in enumerate(lines):
        axis.annotate(
            text, (0, 1), (1, 25 - 9.5 * place), xycoords="axes fraction", textcoords="offset points",
            fontsize=7, color=shade, va="bottom", parse_math=False, annotation_clip=False,
        )  # fmt: skip


def _footer(drawn: int, left_out: int) -> str:
    soft, brain = (f"{WINDOWS[name][0]:g}/{WINDOWS[name][1]:g} HU" for name in ("soft_tissue", "brain"))
    more = f", {left_out:,} more not drawn" if left_out else ""
    return f"{drawn} series{more}. Window (level/width): soft tissue {soft}; heads: brain {brain}"
