"""For whom does it work: every group's AUROC, sensitivity and false positive rate with intervals, in one picture."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medvit.evaluation.charts import COLOURS, FAINT, INK, STYLE, plain, to_svg
from medvit.evaluation.fairness import FairnessTable
from medvit.evaluation.groups import Group

PANELS = {"auroc": "AUROC", "tpr": "Sensitivity", "fpr": "False positive rate"}
MOST_ROWS = 14
"""Attributes whose groups no longer fit are left to their tables."""

GREY = "#9aa5b0"


def draw_groups(tables: Sequence[FairnessTable]) -> str:
    """A row per group and a panel per figure; dashed: all cases. Grey, hollow: too few patients to rely on.

    Args:
        tables: of one positive class, one or more.
    """
    rows: list[tuple[str, Group] | None] = [("All cases", tables[0].overall)]
    for table in tables:
        if len(rows) + len(table.groups) + 1 <= MOST_ROWS:
            rows += [None, *((_shortened(group.name), group) for group in table.groups)]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11.4, 0.7 + 0.27 * len(rows)), layout="constrained")
        panels = figure.subplots(1, len(PANELS), sharey=True, gridspec_kw={"wspace": 0.08})
        for axes, (name, title) in zip(panels, PANELS.items(), strict=True):
            _panel(axes, name, title, rows)
        places = [place for place, row in enumerate(rows) if row is not None]
        names = [f"{plain(row[0])}  ({row[1].patients:,})" for row in rows if row is not None]
        panels[0].set_yticks(places, names)
        panels[0].set_ylim(len(rows) - 0.4, -0.6)
        return to_svg(figure)


def _panel(axes: Axes, name: str, title: str, rows: Sequence[tuple[str, Group] | None]) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set(xlim=(-0.02, 1.02))
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.5)
    axes.set_axisbelow(True)
    for place, row in enumerate(rows):
        if row is None or math.isnan((value := getattr(row[1], name)).point):
            continue
        colour = INK if place == 0 else GREY if row[1].small else COLOURS[0]
        if not math.isnan(value.low):
            axes.plot([value.low, value.high], [place, place], color=colour, linewidth=1.8)
        axes.plot(value.point, place, "o", color=colour, mfc="white" if row[1].small else colour, markersize=6)
        if place == 0:
            axes.axvline(value.point, color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)


def _shortened(name: str) -> str:
    return name if len(name) <= 28 else f"{name[:27]}…"
