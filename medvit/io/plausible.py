"""Whether values can be the Hounsfield units of a patient, whatever file they come from.

Files state a rescale and are wrong about it: it was applied already, or was lost when the file was converted. Nothing
but the values themselves shows that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medvit.records import ReasonCode, ScanError

HU_RANGE_LIMIT = 20_000.0
"""Wider than this is no CT: metal in extended-scale CT stays below."""

ABSENT, PLENTY, MOST = 0.001, 0.1, 0.75
"""Shares of a volume."""

SAMPLED = 96
"""Rows and columns of a slice that are looked at, about, to judge whether its values are CT."""


BODY_HU = (-1200, 3071)
"""Air with its noise, and the densest of 12 bits: metal lies above, a margin that no tag tells below."""


class Tally(NamedTuple):
    """What the values of a slice are like: range in HU, padding pixels, and shares 0..1 of a sample of its pixels.

    `air` is -1200..-600 HU, `tissue` -250..250 HU; `unrescaled` 900..1250 HU is where tissue lies without the intercept
    of -1024, and `twice` -2400..-1700 HU where air lies when it is rescaled twice. `beyond` is outside of `BODY_HU`.
    """

    low: float
    high: float
    padded: int
    air: float
    tissue: float
    unrescaled: float
    twice: float
    beyond: float


def tally(plane: npt.NDArray[np.float32], low: float, high: float, padded: int = 0) -> Tally:
    """The tally of a slice (H, W) in HU whose range is known."""
    step = (max(1, plane.shape[0] // SAMPLED), max(1, plane.shape[1] // SAMPLED))
    sample = plane[:: step[0], :: step[1]]
    shares = [
        float(((sample > low_hu) & (sample < high_hu)).mean())
        for low_hu, high_hu in ((-1200, -600), (-250, 250), (900, 1250), (-2400, -1700))
    ]
    shares.append(float(((sample > BODY_HU[1]) | (sample < BODY_HU[0])).mean()))
    return Tally(low, high, padded, *shares)


def check_plausible(tallies: Sequence[Tally]) -> None:
    """Values that cannot be a CT of a patient are refused.

    A volume without air is legal (a brain reconstructed small), and one with a margin of -2000 is common (padding that
    no tag tells), so that neither decides alone: without air, much must lie where tissue is before rescaling; without
    tissue, where air is after rescaling twice. Of a scanner with another offset than 1024 most lies beyond any body.

    Raises:
        ScanError: `HU_IMPLAUSIBLE`.
    """
    low, high = min(tally.low for tally in tallies), max(tally.high for tally in tallies)
    if not np.isfinite((low, high)).all() or low == high or high - low > HU_RANGE_LIMIT:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, f"values from {low:g} to {high:g} HU")
    air, tissue, unrescaled, twice, beyond = np.mean([tally[3:] for tally in tallies], axis=0)
    if air < ABSENT and unrescaled > PLENTY:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, "no air near -1000 HU, and much around +1000 HU: not rescaled")
    if tissue < ABSENT and twice > PLENTY:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, "no tissue near 0 HU, and much around -2000 HU: rescaled twice")
    if beyond > MOST:
        raise ScanError(ReasonCode.HU_IMPLAUSIBLE, f"{beyond:.0%} lie beyond {BODY_HU[0]} to {BODY_HU[1]} HU")
