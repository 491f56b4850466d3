"""A case, its slices, the model that judged it, and what the model said: what looking into a model takes.

With folds every case has a model of its own, one that never saw it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from medvit.data.pipelines import Slices
from medvit.inference import Model
from medvit.records import Case, Prediction


@dataclass(frozen=True)
class Judged:
    """One labelled case that was predicted.

    Attributes:
        model: which predicted it.
        case: with its label.
        prediction: what the model said.
        load: case -> prepared slices, int16 HU (Z, size, size).
    """

    model: Model
    case: Case
    prediction: Prediction
    load: Callable[[Case], Slices]

    @property
    def slices(self) -> Slices:
        """Those that the prediction looked at, int16 HU (S, size, size)."""
        return self.load(self.case)[[number for number, _ in self.prediction.slice_weights]]

    @property
    def right(self) -> bool:
        """Whether the call is the label."""
        return self.prediction.predicted == self.case.label
