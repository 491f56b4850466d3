"""Whether an encoder that learned without labels still tells slices apart: the failure that its loss does not show.

Two figures of features on cases it did not learn from. An encoder that gives the same for everything has rank 1 and
spread 0; one that has given up most of its dimensions has a low rank alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

LOWEST_RANK = 1.2
"""Effective rank at which one direction is nearly all there is. Random ViTs on slices of phantoms: 2 to 5."""

LOWEST_SPREAD = 0.01
"""Spread below which slices are the same but for rounding and noise. Random ViTs on slices of phantoms: 0.04 to 0.2."""


FEWEST = 8
"""Features below which both figures are low by themselves: of one, rank 1 and spread 0 whatever the encoder."""


class Health(NamedTuple):
    """`rank` from 1 to at most min(N, D), and `spread`, 0 to 1, of N features; `telling` where N is enough."""

    rank: float
    spread: float
    telling: bool

    @property
    def collapsed(self) -> bool:
        """Whether next to nothing is told apart."""
        return self.telling and (self.rank < LOWEST_RANK or self.spread < LOWEST_SPREAD)


def examine(features: npt.NDArray[np.floating]) -> Health:
    """Rank and spread of features (N, D)."""
    values = np.asarray(features, np.float64)
    return Health(effective_rank(values), spread(values), telling=len(values) >= FEWEST)


def effective_rank(features: npt.NDArray[np.float64]) -> float:
    """RankMe (Garrido et al. 2023, arXiv 2210.02885): exp of the entropy of the singular values as shares of their sum.

    Args:
        features: (N, D), not centred, as there. All zero: 1.
    """
    values = np.linalg.svd(features, compute_uv=False)
    if not values.sum() > 0:
        return 1.0
    shares = values / values.sum()
    shares = shares[shares > 0]
    return float(np.exp(-(shares * np.log(shares)).sum()))


def spread(features: npt.NDArray[np.float64]) -> float:
    """Mean standard deviation of features (N, D) of length 1, times the root of D (Chen and He 2020, arXiv 2011.10566).

    0: all are the same; 1: they point into all directions alike.
    """
    length = np.linalg.norm(features, axis=1, keepdims=True)
    units = features / np.maximum(length, np.finfo(np.float64).tiny)
    return float(units.std(axis=0).mean() * np.sqrt(features.shape[1]))
