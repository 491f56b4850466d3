"""How a training went, from its history: when it had learned what it would learn, and when it began to overfit.

One noisy epoch decides nothing: every curve is smoothed by the median of three neighbouring epochs first, which no
single outlier moves, at the ends neither. Differences are compared, never divided by: a flat curve is no error.

A *history* is the rows of one fold of `metrics.jsonl`, one per epoch (`epoch` from 1, `loss`, `val_auroc`, `val_loss`).
Epochs whose figure is missing or undefined are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medvit.evaluation.metrics import Floats
from medvit.records import UsageError

History = Sequence[Mapping[str, Any]]

WINDOW = 3
"""Epochs of which a median is taken; a shorter history tells nothing."""

EPOCHS_IN_A_ROW = 3
"""That the gap must grow for, to be called overfitting."""

CHANCE = 0.5
"""AUROC of a model that has learned nothing."""


@dataclass(frozen=True, kw_only=True)
class Learning:
    """How the training of one model went.

    Attributes:
        fold: which; 0 where there is one split.
        epochs: that it took.
        converged: `convergence_epoch`.
        overfit: `overfitting_onset`.
    """

    fold: int
    epochs: int
    converged: int | None
    overfit: int | None


def how_it_went(histories: Sequence[History]) -> tuple[Learning, ...]:
    """Of each fold's history."""
    return tuple(
        Learning(fold=fold, epochs=len(rows), converged=convergence_epoch(rows), overfit=overfitting_onset(rows))
        for fold, rows in enumerate(histories)
    )


def read_history(path: str | Path) -> dict[int, list[dict[str, Any]]]:
    """Fold -> rows of a run's `metrics.jsonl`.

    Raises:
        UsageError: no such file, or a line that is no row of it.
    """
    folds: dict[int, list[dict[str, Any]]] = {}
    try:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            folds.setdefault(int(row.get("fold", 0)), []).append(row)
    except (OSError, ValueError, AttributeError):
        raise UsageError(f"{path}: no metrics of a run. Give the metrics.jsonl that medvit-train wrote.") from None
    return folds


def convergence_epoch(
    history: History, *, figure: str = "val_auroc", start: float = CHANCE, share: float = 0.95
) -> int | None:
    """First epoch from which the smoothed figure stays at or above `share` of the way from start to its best.

    Args:
        history: rows of one fold.
        figure: higher is better.
        start: its value where nothing is learned.
        share: 0..1.

    Returns:
        The epoch; None where the smoothed figure never rises above the start, ends below that share, or fewer than
        three epochs have it.

    Raises:
        ValueError: rows of several folds.
    """
    epochs, scores = _curve(history, lambda row: row[figure], figure)
    if not len(scores) or scores.max() <= start:
        return None
    below = np.flatnonzero(scores < start + share * (scores.max() - start))
    settled = int(below[-1]) + 1 if len(below) else 0
    return epochs[settled] if settled < len(epochs) else None


def overfitting_onset(history: History) -> int | None:
    """First of several epochs in a row in which the smoothed gap, validation less training loss, is positive and grows.

    Medians of a noisy rise repeat, so that a gap may stand still between the first and the last of these epochs; it
    must not shrink. While the gap is negative or shrinks, nothing is overfit: augmentation, dropout and class weights
    make training harder than validation. With mixup or focal loss the two losses are of two kinds, and the gap means
    little.

    Args:
        history: rows of one fold.

    Returns:
        The epoch; None where it never happens, or the history is too short to tell.

    Raises:
        ValueError: rows of several folds.
    """
    epochs, gap = _curve(history, lambda row: row["val_loss"] - row["loss"], "loss", "val_loss")
    steps = np.where(gap[1:] > 0, np.diff(gap), -1.0)  # a gap below zero counts as one that shrinks
    for first in range(len(steps) - EPOCHS_IN_A_ROW + 1):
        row = steps[first : first + EPOCHS_IN_A_ROW]
        if row.min() >= 0 and row[0] > 0 and row[-1] > 0:
            return epochs[first + 1]
    return None


def _curve(history: History, value: Callable[[Mapping[str, Any]], float], *figures: str) -> tuple[list[int], Floats]:
    """Epochs that have all the figures, and a value of theirs, smoothed; nothing for fewer than `WINDOW`."""
    rows = [row for row in history if all(_known(row.get(figure)) for figure in figures)]
    epochs = [int(row["epoch"]) for row in rows]
    if any(later <= earlier for earlier, later in pairwise(epochs)):
        raise ValueError("epochs must rise: give the rows of one fold at a time")
    if len(rows) < WINDOW:
        return [], np.empty(0)
    return epochs, _smoothed(np.array([value(row) for row in rows], np.float64))


def _known(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _smoothed(values: Floats) -> Floats:
    """Running median of three (E,) -> (E,); the first and the last are those of their neighbours."""
    medians = np.median(np.lib.stride_tricks.sliding_window_view(values, WINDOW), axis=1)
    return np.pad(medians, WINDOW // 2, mode="edge")
