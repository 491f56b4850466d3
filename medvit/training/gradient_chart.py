"""Gradient errors as a picture and a table: how far off, how scattered, and what both come to at the price of each."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medvit.models.compression import NONE, Compression
from medvit.training.gradient_error import GradientError

PANELS: dict[str, Callable[[GradientError], float]] = {
    "cost-adjusted MSE": lambda error: error.ca_mse,
    "bias²": lambda error: error.bias2,
    "cost × variance": lambda error: error.cost * error.variance,
}
"""Title -> what is drawn."""

WAYS: dict[str, tuple[str, str, Callable[[Compression], bool]]] = {
    "tokens dropped": ("o", "-", lambda one: one.patch is None),
    "larger patches": ("s", "--", lambda one: one.patch is not None and one.keep == 1),
    "both": ("D", ":", lambda one: one.patch is not None and one.keep < 1),
}
"""Name -> marker, line, and what is meant. Nothing left out is where the first line begins."""

COLOURS = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00")
"""Of stages, early to late; Okabe and Ito's, told apart by colour-blind readers."""

INK = "#3b4754"

LINEAR_UP_TO = 5.0
"""Beyond so many times the uncompressed error the axis is logarithmic."""


def draw_errors(errors: Sequence[GradientError]) -> Figure:
    """Three panels against the share of tokens; a colour for each point of the training, a line for each way to save.

    Every point is in units of its own uncompressed error, so that 1 is break-even in the first panel, where a ring
    marks what is best. An estimate of bias² may lie below 0.

    Args:
        errors: of `run_pilot`; the uncompressed gradient is among them at each point.
    """
    figure = Figure(figsize=(11, 3.9), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    points = sorted({error.progress for error in errors})
    for panel, (title, value) in zip(panels, PANELS.items(), strict=True):
        for number, progress in enumerate(points):
            stage = [error for error in errors if error.progress == progress]
            unit = next(error.ca_mse for error in stage if error.compression == NONE)
            heights = {error: value(error) / unit for error in stage}
            _draw(panel, heights, COLOURS[number % len(COLOURS)], f"{100 * progress:.0f} %")
            if panel is panels[0]:
                best = min(stage, key=lambda error: error.ca_mse)
                panel.plot(best.tokens_share, heights[best], "o", ms=10, mfc="none", mec=COLOURS[number % len(COLOURS)])
        _dress(panel, title)
    panels[0].set_ylabel("of the uncompressed error")
    panels[0].legend(title="progress", frameon=False, fontsize=8, title_fontsize=8)
    ways = [panels[2].plot([], [], marker + line, color=INK, label=name)[0] for name, (marker, line, _) in WAYS.items()]
    panels[2].legend(handles=ways, frameon=False, fontsize=8, handlelength=3)
    return figure


def _draw(panel: Axes, heights: Mapping[GradientError, float], colour: str, label: str) -> None:
    for number, (marker, line, meant) in enumerate(WAYS.values()):
        way = sorted((error for error in heights if meant(error.compression)), key=lambda error: error.tokens_share)
        shares, values = [error.tokens_share for error in way], [heights[error] for error in way]
        panel.plot(shares, values, marker + line, color=colour, lw=1.3, ms=4.5, label=label if number == 0 else None)


def _dress(panel: Axes, title: str) -> None:
    panel.axhline(0 if title == "bias²" else 1, color=INK, linewidth=0.8, linestyle=":")
    low, high = panel.get_ylim()
    if high > LINEAR_UP_TO:
        panel.set_yscale("symlog", linthresh=LINEAR_UP_TO)
    elif title != "bias²":
        panel.set_ylim(min(low, 0), high)
    panel.set_title(title, fontsize=10)
    panel.set_xlabel("share of patch tokens")
    panel.spines[["top", "right"]].set_visible(False)


def write_errors(errors: Sequence[GradientError], path: Path) -> None:
    """gradient_error.csv: a row for each compression at each point."""
    columns = ("tokens_share", "bias2", "bias2_error", "variance", "cost", "ca_mse", "cosine")
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(("progress", "keep", "patch", *columns, "steps"))
        for error in errors:
            figures = (f"{getattr(error, column):.6g}" for column in columns)
            patch = error.compression.patch or ""
            writer.writerow((f"{error.progress:g}", error.compression.keep, patch, *figures, error.steps))
