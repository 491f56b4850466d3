"""The report's pictures as inline SVG text: no file, no script, no link, text that stays text.

Drawn without pyplot, so that nothing global is touched. Colours are Okabe and Ito's, told apart by colour-blind
readers; line styles differ as well.
"""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Bools, Floats, divide, tied
from medvit.evaluation.predictions import OneVsRest, class_names

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
INK, FAINT = "#3b4754", "#c9d1d9"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medvit",  # the same numbers give the same file
    "font.size": 9.5,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
GRID = np.linspace(0, 1, 101)


def draw_roc(view: OneVsRest, bootstrap: PatientBootstrap) -> str:
    """ROC curve; for two classes with the pointwise interval of the patient bootstrap and the operating point."""
    with mpl.rc_context(STYLE):
        figure, axes = _square("False positive rate (1 - specificity)", "True positive rate (sensitivity)")
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
        for c, name in enumerate(view.names):
            truth, called, score = view.truth[:, c], view.called[:, c], view.score[:, c]
            if truth.all() or not truth.any():
                continue
            if len(view.names) == 1:
                low, high = _roc_band(truth, score, bootstrap)
                axes.fill_between(GRID, low, high, color=COLOURS[0], alpha=0.15, linewidth=0)
            fpr, tpr, _ = roc_curve(truth, score)
            axes.plot(fpr, tpr, color=_colour(c), linestyle=STYLES[c % len(STYLES)], label=name, linewidth=1.8)
            axes.plot(called[~truth].mean(), called[truth].mean(), "o", color=_colour(c), markersize=7, mec="white")
        if len(axes.lines) == 1:
            axes.text(0.5, 0.2, "undefined: one class only", ha="center")
        elif len(view.names) > 1:
            axes.legend(loc="lower right")
        return to_svg(figure)


def draw_reliability(view: OneVsRest) -> str:
    """Observed share against mean probability in ten bins of equal width, and below how many cases each bin holds."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        axes, counts = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1)
        for c, name in enumerate(view.names):
            truth, score = view.truth[:, c], np.clip(view.score[:, c], 0, 1)
            observed, mean = calibration_curve(truth, score, n_bins=10, pos_label=True) if truth.any() else ([], [])
            axes.plot(
                mean,
                observed,
                marker="o",
                markersize=5,
                color=_colour(c),
                linestyle=STYLES[c % len(STYLES)],
                label=name,
            )
            counts.hist(score, bins=10, range=(0, 1), color=_colour(c), alpha=0.45)
        axes.set(ylim=(-0.02, 1.02), ylabel="Observed share")
        counts.set(xlim=(-0.02, 1.02), xlabel="Predicted probability", ylabel="Cases")
        if len(view.names) > 1:
            axes.legend(loc="upper left")
        return to_svg(figure)


def draw_scores(frame: pd.DataFrame, thresholds: tuple[float, ...]) -> str:
    """Distribution by true class: of the positive probability for two classes, else of the true class's own."""
    classes = class_names(frame)
    label = frame["label"].to_numpy(dtype=object)
    own = len(classes) > 2
    with mpl.rc_context(STYLE):
        described = "Probability given to the true class" if own else f"Probability of {classes[-1]}"
        figure, axes = _square(plain(described), "Share of the class")
        for c, name in enumerate(classes):
            score = frame.loc[label == name, f"p_{name if own else classes[-1]}"].to_numpy(dtype=np.float64)
            weights = np.full(len(score), 1 / max(1, len(score)))
            options: dict[str, Any] = {
                "bins": 20,
                "range": (0, 1),
                "weights": weights,
                "color": _colour(c if own else 1 - c),
            }
            axes.hist(score, histtype="stepfilled", alpha=0.25, **options)
            axes.hist(
                score, histtype="step", linewidth=1.5, linestyle=STYLES[c % len(STYLES)], label=plain(name), **options
            )
        if 0 < len(thresholds) <= 10:
            axes.vlines(thresholds, 0, 1, transform=axes.get_xaxis_transform(), color=INK, linewidth=1, linestyle=":")
        axes.autoscale(axis="y")
        axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # room for the legend
        axes.legend(loc="upper center")
        return to_svg(figure)


def _roc_band(truth: Bools, score: Floats, bootstrap: PatientBootstrap) -> tuple[Floats, Floats]:
    """Ends (101,) of the pointwise interval of the true positive rate at each false positive rate of GRID."""

    def at_grid(weights: Floats) -> Floats:
        positive, negative = (side.cumsum(axis=1) for side in tied(truth, -score, weights))
        tpr, fpr = divide(positive, positive[:, -1:] + 0 * positive), divide(negative, negative[:, -1:] + 0 * negative)
        pairs = zip(fpr, tpr, strict=True)
        return np.stack([np.interp(GRID, np.append(0, x), np.append(0, y)) for x, y in pairs])

    _, draws = bootstrap.apply(at_grid)
    defined = draws[~np.isnan(draws).any(axis=1)]
    tail = (1 - bootstrap.confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail], axis=0) if len(defined) else np.full((2, len(GRID)), np.nan)
    return low, high


def _square(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def plain(name: str) -> str:
    """A class name as text: `$` would start a formula, a leading underscore would hide it from the legend."""
    return name.replace("$", r"\$").lstrip("_")


def to_svg(figure: Figure) -> str:
    """SVG element for an HTML page: scales with its place, inherits the font, names no other host."""
    buffer = io.StringIO()
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # the namespaces are implied inside HTML and look like links; ids of groups would repeat on the page
    text = re.sub(r' xmlns(:xlink)?="[^"]*"|(?<=<g) id="[^"]*"', "", text)
    text = re.sub(r' width="[\d.]+pt"| height="[\d.]+pt"', "", text, count=2).replace("xlink:href", "href")
    return text.replace("'DejaVu Sans'", "system-ui").replace("DejaVu Sans", "system-ui")
