"""Is there any gap at all? A permutation test of equal rates in all groups.

If true and false positive rates do not depend on the group, exchanging the groups between patients changes nothing but
chance: the share of exchanges that look as uneven as the truth is a p-value, exact for any number of patients (Fisher;
Phipson and Smyth 2010 for the added one). Whole patients are exchanged, since their cases resemble each other, and only
between patients with the same kinds of cases (with the finding, without, both), so that another prevalence is no gap.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medvit.evaluation.metrics import Bools, Floats, divide

CHUNK_CELLS = 4_000_000
"""Exchanged group codes held at once."""


def no_gap_p(
    truth: Bools,
    called: Bools,
    groups: npt.NDArray[np.generic],
    patients: npt.NDArray[np.generic],
    draws: int = 2000,
    seed: int = 0,
) -> float:
    """p-value of the hypothesis that TPR and FPR are equal in all groups; NaN with fewer than two groups.

    The statistic is the largest deviation of a group's rate from the rate of all, in binomial standard errors. A
    patient with cases in several groups counts once in each: that makes the test cautious.

    Args:
        truth: (n,) the case has the finding.
        called: (n,) the case was called so.
        groups: (n,) group of each case.
        patients: (n,) patient of each case.
        draws: exchanges.
        seed: of the exchanges.
    """
    names, code = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        return float("nan")
    _, person = np.unique(patients, return_inverse=True)
    _, first, unit = np.unique(person * len(names) + code, return_index=True, return_inverse=True)
    cells = [truth & called, truth, ~truth & called, ~truth]
    counts = np.stack([np.bincount(unit, cell, len(first)) for cell in cells], axis=1).astype(np.float64)
    # (units, 4); what may be exchanged is of one kind
    kind = (counts[:, 1] > 0).astype(int) + 2 * (counts[:, 3] > 0)
    own, rng = code[first], np.random.default_rng(seed)
    observed = _unevenness(own[None], counts, len(names))[0]
    as_uneven, step = 0, max(1, CHUNK_CELLS // len(own))
    for start in range(0, draws, step):
        exchanged = np.tile(own, (min(step, draws - start), 1))
        for one in np.unique(kind):
            among = np.flatnonzero(kind == one)
            exchanged[:, among] = rng.permuted(exchanged[:, among], axis=1)
        as_uneven += int((_unevenness(exchanged, counts, len(names)) >= observed - 1e-9).sum())
    return (as_uneven + 1) / (draws + 1)


def _unevenness(codes: npt.NDArray[np.intp], counts: Floats, groups: int) -> Floats:
    """Largest deviation of each exchange: codes (D, units), counts (units, 4) -> (D,)."""
    totals = np.stack([(codes == g).astype(np.float64) @ counts for g in range(groups)], axis=1)  # (D, G, 4)
    everyone = counts.sum(axis=0)
    found = np.zeros(len(codes))
    for hits, among in ((0, 1), (2, 3)):
        size, of = totals[:, :, among], everyone[among]
        rate = everyone[hits] / max(1.0, of)
        error = np.sqrt(rate * (1 - rate) * np.maximum(0.0, divide(np.ones_like(size), size) - 1 / max(1.0, of)))
        deviation = np.abs(divide(totals[:, :, hits], size) - rate)
        found = np.fmax(found, np.fmax.reduce(divide(deviation, error), axis=1))
    return found
