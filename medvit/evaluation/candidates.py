"""Candidate weights, and what each sees in the cases before it is trained on any of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from medvit.config import Config, ModelConfig
from medvit.data.pipelines import Slices
from medvit.inference import Encoder
from medvit.models.backbone import Backbone, build_backbone, normalisation
from medvit.models.classifier import CtClassifier
from medvit.models.source import build_source_classifier
from medvit.models.weights import check_input
from medvit.records import Case

Floats = npt.NDArray[np.float32]


class Candidate(NamedTuple):
    """Weights that could be trained further; `name` is what the person calls them."""

    name: str
    model: ModelConfig


class Sight(NamedTuple):
    """What a candidate sees in N cases: `features` (N, D), and `source` (N, Z), None where it brings no classifier.

    The latter are probabilities of its own classes. Both are means over the slices that a prediction looks at.
    """

    features: Floats
    source: Floats | None


def backbones(candidate: Candidate, config: Config) -> tuple[Backbone, Backbone | None]:
    """The candidate without its classifier and, if its weights bring one, with it.

    Raises:
        UsageError: weights that are missing, damaged, unreachable, or made for another architecture or other slices; or
            a size that the model cannot take.
    """
    torch.manual_seed(config.training.seed)
    prep, channels = config.preprocessing, len(config.preprocessing.windows)
    size = prep.size
    backbone, report = build_backbone(candidate.model, size=size, channels=channels)
    mean, std = normalisation(backbone, channels)
    check_input(report, prep, prep.mean or mean, prep.std or std)
    return backbone, build_source_classifier(candidate.model, size=size, channels=channels)


def check_candidate(candidate: Candidate, config: Config) -> None:
    """Load a candidate and forget it, so that what is wrong with it shows before an hour of reading.

    Raises:
        UsageError: as `backbones`.
    """
    backbones(candidate, config)


def see_cases(
    candidate: Candidate,
    config: Config,
    cases: Sequence[Case],
    load: Callable[[Case], Slices],
    step: Callable[[], None] = lambda: None,
) -> Sight:
    """Show all cases to a candidate, as a prediction would.

    Args:
        candidate: which.
        config: size, windows, slice rule, slices at once.
        cases: N.
        load: a case -> int16 HU (Z, size, size).
        step: called after each case.

    Raises:
        UsageError: as `backbones`.
    """
    prep, (backbone, source) = config.preprocessing, backbones(candidate, config)
    mean, std = normalisation(backbone, len(prep.windows))
    encoders = [
        Encoder(
            CtClassifier(one, candidate.model, 2),
            prep,
            prep.mean or mean,
            prep.std or std,
            config.inference.batch_slices,
        )
        for one in (backbone, source)
        if one is not None
    ]
    rows = []
    for row in zip(*(encoder.means(map(load, cases)) for encoder in encoders), strict=True):
        rows.append(row)
        step()
    features, *probabilities = (np.stack(column) for column in zip(*rows, strict=True))
    return Sight(features, probabilities[0] if probabilities else None)
