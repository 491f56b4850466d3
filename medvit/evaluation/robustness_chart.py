"""The picture of robustness: a small panel for each corruption and attack, AUROC against severity."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medvit.evaluation.charts import COLOURS, FAINT, INK, STYLE, to_svg
from medvit.evaluation.curves import Curve, Robustness

COLUMNS = 5


def draw_robustness(measured: Robustness) -> str:
    """AUROC by severity in each panel, from the clean value (dashed), all on one scale; inline SVG.

    The band is the clean value plus the interval of the paired change: where the dashed line is outside of it, the
    change is not chance. Every panel says how many cases it rests on.
    """
    with mpl.rc_context(STYLE | {"font.size": 8.5}):
        rows = -(-max(1, len(measured.curves)) // COLUMNS)
        figure = Figure(figsize=(2.05 * COLUMNS, 2.15 * rows), layout="constrained")
        panels = figure.subplots(rows, COLUMNS, sharey=True, squeeze=False).ravel()
        for panel in panels[len(measured.curves) :]:
            panel.axis("off")
        if not measured.curves:
            figure.text(0.5, 0.5, "nothing was measured", ha="center")
        for panel, curve in zip(panels, measured.curves, strict=False):
            _draw(panel, curve)
        for panel in panels[: len(measured.curves) : COLUMNS]:
            panel.set_ylabel("AUROC")
        if measured.curves:
            panels[0].set_ylim(*_limits(measured))
        return to_svg(figure)


def _draw(panel: Axes, curve: Curve) -> None:
    severities = np.array([0.0, *(level.severity for level in curve.levels)])
    points = np.array([curve.clean.point, *(level.auroc for level in curve.levels)])
    ends = np.array([[0.0, 0.0], *([level.change.low, level.change.high] for level in curve.levels)])
    order = np.argsort(severities)
    low, high = np.clip(curve.clean.point + ends[order].T, 0, 1)
    panel.axhline(0.5, color=FAINT, linewidth=1)
    panel.axhline(curve.clean.point, color=INK, linewidth=1, linestyle="--")
    panel.fill_between(severities[order], low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
    panel.plot(severities[order], points[order], "o-", color=COLOURS[0], linewidth=1.6, markersize=4, mec="white")
    panel.set_title(f"{curve.name}, {curve.cases} cases", fontsize=9)
    panel.set_xlabel(curve.unit)
    panel.locator_params(axis="x", nbins=5)


def _limits(measured: Robustness) -> tuple[float, float]:
    """From below the lowest curve (at least down to chance) to 1."""
    lowest = np.nanmin([0.5, *(level.auroc for curve in measured.curves for level in curve.levels)])
    return max(0.0, float(lowest) - 0.08), 1.02
