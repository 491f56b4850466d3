"""Cases as a model judges them, and what can be learned from looking into it: maps, robustness, latency, cost.

Shared by medvit-train and medvit-evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import medvit
from medvit import data, evaluation
from medvit.cli.console import Display
from medvit.config import EvaluationConfig
from medvit.records import Case, Prediction


def predict(model: medvit.Model, case: Case, cache: data.SliceCache) -> tuple[Prediction, npt.NDArray[np.float32]]:
    """A prediction, and the features (D,) that it rests on.

    Raises:
        ScanError: NOT_FOR_MODEL.
    """
    model.refuse(case)
    chosen, output = model.encoder.study(cache.load(case))
    return model.prediction(case, chosen, output), output.pooled


def refused_row(classes: Sequence[str], case: Case, code: str) -> dict[str, Any]:
    """A row of predictions.csv without probabilities."""
    told = ("case_id", "patient_id", "label", "site", "sex", "age", "study_uid", "series_uid")
    empty = dict.fromkeys((f"p_{name}" for name in classes), "")
    row = {name: getattr(case, name) for name in told} | empty | {"flags": code}
    return row | {name: value for name, value in case.attributes.items() if name not in row}


def look_into(
    judged: Sequence[medvit.Judged],
    settings: EvaluationConfig,
    display: Display,
    *,
    labelled: int = 0,
    hours: float | None = None,
) -> evaluation.Further:
    """What a report says beyond its figures: what the model looked at, how long it takes, what that costs.

    Args:
        judged: held-out cases as they were predicted.
        settings: what is asked for, and caps.
        display: where progress goes.
        labelled: cases that were labelled for training.
        hours: of computing that training took; None where it is not known: then neither are costs.
    """
    if not judged:
        return evaluation.Further()
    explanation = None
    if settings.attention is not None:
        display.start("what it looked at", settings.attention.cases)
        explanation = evaluation.explain(judged, settings, display.step)
    robustness = None
    if settings.robustness is not None:
        display.start("what breaks it", len(evaluation.STRESSES))
        robustness = evaluation.measure_robustness(judged, settings, display.step)
    latency = evaluation.measure_latency(judged)
    cost = None
    if settings.prices is not None and hours is not None:
        cost = evaluation.cost_of_ownership(settings.prices, latency, labelled, hours)
    return evaluation.Further(explanation=explanation, robustness=robustness, latency=latency, cost=cost)
