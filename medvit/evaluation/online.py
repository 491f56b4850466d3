"""How good features are while they are being learned without labels: neighbours and a linear probe, once an epoch.

Both know the labels of training patients alone and are asked about validation patients, whom the encoder has never
seen. Labels teach it nothing. With few validation patients the figures jump: look at where they go, not at one of them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from medvit.evaluation.metrics import Floats, macro_auroc

NEIGHBOURS = 20
"""At most so many cases vote, as in DINO (Caron et al. 2021, arXiv 2104.14294)."""

TEMPERATURE = 0.07
"""Of votes: exp(cosine / temperature), as there."""


def probe_online(
    features: npt.ArrayLike, labels: npt.ArrayLike, asked: npt.ArrayLike, truth: npt.ArrayLike
) -> dict[str, float]:
    """Judge features by labels that did not teach them.

    Args:
        features: (N, D) of labelled training cases.
        labels: (N,) their class index.
        asked: (M, D) of labelled validation cases.
        truth: (M,) their class index.

    Returns:
        `knn`: balanced accuracy of a vote among neighbours, chance is 1 / K; `auroc`: of a linear probe. NaN where a
        class is missing on either side.
    """
    bank, index, queries, wanted = (np.asarray(one) for one in (features, labels, asked, truth))
    classes = np.union1d(index, wanted)
    if len(classes) < 2 or not (np.isin(classes, index).all() and np.isin(classes, wanted).all()):
        return {"knn": math.nan, "auroc": math.nan}
    known, real = np.searchsorted(classes, index), np.searchsorted(classes, wanted)
    said = neighbour_votes(bank, known, queries).argmax(axis=1)
    recalls = [(said[real == k] == k).mean() for k in range(len(classes))]
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(bank, known)
    return {"knn": float(np.mean(recalls)), "auroc": macro_auroc(real, probe.predict_proba(queries))}


def neighbour_votes(bank: npt.NDArray[np.floating], labels: npt.NDArray[np.intp], queries: Floats) -> Floats:
    """Weighted votes (M, K) of the nearest cases by cosine.

    Args:
        bank: (N, D) features.
        labels: (N,) class index 0..K-1.
        queries: (M, D).
    """
    units, asked = (one / np.maximum(np.linalg.norm(one, axis=1, keepdims=True), 1e-12) for one in (bank, queries))
    cosines = asked @ units.T  # (M, N)
    nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :NEIGHBOURS]
    weights = np.exp((np.take_along_axis(cosines, nearest, axis=1) - 1) / TEMPERATURE)
    return np.asarray(np.einsum("mk,mkc->mc", weights, np.eye(labels.max() + 1)[labels[nearest]]))
