"""One study at work: its files are read, the model judges them, and the slice that decided is drawn.

Whatever goes wrong costs this study alone and ends as a reason code. The texts of errors from elsewhere may hold values
of headers, so only their kind is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from medvit.data.pipelines import Slices, prepare_slices
from medvit.deployment.choice import Listed
from medvit.evaluation.attention import relevance_maps
from medvit.evaluation.explained import PREFERRED
from medvit.evaluation.overlays import overlay_panels
from medvit.inference import Model, StudyOutput
from medvit.io import read
from medvit.models.watching import watchable
from medvit.records import Case, Prediction, ReasonCode, ScanError


@dataclass(frozen=True)
class Prepared:
    """What the model is shown of a case: slices (S, size, size) int16 HU, and their numbers (S,) in the scan."""

    case: Case
    numbers: npt.NDArray[np.intp]
    slices: Slices


@dataclass(frozen=True)
class Picture:
    """The slice that decided: its number, and RGB (H, W, 3) with what the model looked at."""

    number: int
    rgb: npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Answer:
    """A prediction of a case, or why there is none."""

    case: Case
    prediction: Prediction | None = None
    picture: Picture | None = None
    code: str = ""
    detail: str = ""


def prepare(one: Listed, model: Model) -> Prepared:
    """Read a study as it was listed, and prepare the slices that a prediction looks at.

    Raises:
        ScanError: it cannot be read, has changed since, or the model must not be asked about it.
    """
    model.refuse(one.case)
    scan = read(one.series)
    numbers = model.encoder.choose(len(scan.hu))
    flagged = replace(one.case, codes=tuple(dict.fromkeys((*one.case.codes, *scan.codes))))
    return Prepared(flagged, numbers, prepare_slices(scan, model.preprocessing, numbers))


def judge(prepared: Prepared, model: Model, *, draw: bool) -> Answer:
    """Predict a prepared case, and draw the slice that decided; a model that fails is an answer too."""
    try:
        output = model.encoder.look(prepared.slices)
        prediction = model.prediction(prepared.case, prepared.numbers, output)
        picture = draw_decisive(prepared, prediction, output, model) if draw else None
    except (MemoryError, torch.OutOfMemoryError) as error:
        return failure(prepared.case, error)
    except Exception as error:  # noqa: BLE001  one case never stops a batch; its kind is kept
        return Answer(prepared.case, code=str(ReasonCode.MODEL_FAILED), detail=type(error).__name__)
    return Answer(prepared.case, prediction, picture)


def failure(case: Case, error: BaseException) -> Answer:
    """The answer that an error is."""
    match error:
        case ScanError():
            return Answer(case, code=str(error.code), detail=error.detail)
        case MemoryError() | torch.OutOfMemoryError():
            return Answer(case, code=str(ReasonCode.OUT_OF_MEMORY), detail="the study needs more memory than is free")
        case OSError():
            return Answer(case, code=str(ReasonCode.IO_ERROR), detail=type(error).__name__)
        case _:
            return Answer(case, code=str(ReasonCode.WORKER_DIED), detail=type(error).__name__)


def draw_decisive(prepared: Prepared, prediction: Prediction, output: StudyOutput, model: Model) -> Picture:
    """The slice with the largest weight, and over it what spoke for the finding; plain where nobody can tell.

    With two classes the finding is the second, also where it was not called.
    """
    place = int(np.argmax(output.weights))
    names = list(prediction.probabilities)
    target = 1 if len(names) == 2 else names.index(prediction.predicted)
    relevance: npt.NDArray[Any] = np.zeros((1, 1), np.float32)
    if watchable(model.encoder.classifier.backbone):
        method = PREFERRED[0]
        maps = relevance_maps(model.encoder, prepared.slices, output.features, target, [place], [method])
        relevance = maps[method][0]
    rgb = overlay_panels(prepared.slices[place], relevance, model.preprocessing.windows)
    return Picture(int(prepared.numbers[place]), rgb)
