"""What a site, a sex or an age says about the label by itself: a model may have learned that instead of the finding."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medvit.evaluation.bootstrap import PatientBootstrap
from medvit.evaluation.metrics import Bools, Interval, divide

FOLDS = 5


def auroc_of_attribute(truth: Bools, names: npt.NDArray[np.str_], bootstrap: PatientBootstrap) -> Interval:
    """AUROC of predicting the label from the attribute alone: above 0.5 the attribute is confounded with the label.

    Each case scores the share of positives among cases of the same value in the other folds (5 patient-wise folds);
    pairs are compared within a fold, so that the share's dependence on the fold does not count. A value not seen in the
    other folds scores their overall share.
    """
    patients, index = np.unique(bootstrap.patients, return_inverse=True)
    fold = (np.random.default_rng(bootstrap.seed).permutation(len(patients)) % FOLDS)[index]
    _, codes = np.unique(names, return_inverse=True)
    score = np.zeros(len(truth))
    for k in range(FOLDS):
        seen = fold != k
        cases = np.bincount(codes[seen], minlength=codes.max() + 1).astype(np.float64)
        positives = np.bincount(codes[seen & truth], minlength=codes.max() + 1).astype(np.float64)
        share = divide(positives, cases)
        overall = truth[seen].mean() if seen.any() else 0.0
        score[~seen] = np.where(np.isnan(share), overall, share)[codes[~seen]]
    return bootstrap.auroc(truth, score, fold)
