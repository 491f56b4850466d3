"""What values of a window are normalised by: given, of the training split, or what the weights were trained with."""

from __future__ import annotations

from collections.abc import Iterable

from medvit.config import Config
from medvit.data.pipelines import Slices, window_statistics
from medvit.models.backbone import normalisation
from medvit.models.classifier import CtClassifier


def mean_and_std(
    config: Config, classifier: CtClassifier, training: Iterable[Slices]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per window of values in 0..1.

    Args:
        config: what was asked for.
        classifier: with its weights.
        training: int16 HU (Z, size, size) of the training split and of no other; only read where it is needed.
    """
    prep = config.preprocessing
    if prep.mean is not None and prep.std is not None:
        return prep.mean, prep.std
    if config.data.normalise == "training":
        return window_statistics(training, prep.windows)
    return normalisation(classifier.backbone, len(prep.windows))
