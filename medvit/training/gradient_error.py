"""What a compressed gradient is worth: how far it is off on average, how much it scatters, and what it costs.

At one price a gradient of relative cost c averages 1 / c times as many steps as the uncompressed one, so its mean
squared error per unit of compute is bias² + c * variance: the cost-adjusted MSE (Lin et al. 2024, arXiv 2410.22364).
The compression with the least is the one to train with at that point. Costs are measured
(`medvit.training.gradient_measurement`), not counted in tokens: equal numbers of steps are no fair comparison, and
neither are equal numbers of operations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvit.config import AccelerationStep
from medvit.models.compression import NONE, Compression

Floats = npt.NDArray[np.float64]

DIMENSIONS = 2**16
"""Of the projection: inner products of two gradients are off by about 1 / 256 of their norms."""

UNCOMPRESSED_FROM = 0.85
"""Share of what a backbone learns from which on a derived schedule leaves nothing out."""


@dataclass(frozen=True)
class GradientError:
    """Of one compression at one point of the training.

    Attributes:
        progress: 0..1 of the training.
        compression: what was left out.
        tokens_share: of the uncompressed tokens.
        bias2: squared norm of the mean difference from the uncompressed gradient, estimated without bias: around 0 for
            an unbiased one, and below it as often as above.
        variance: of the gradient of one optimizer step, summed over its directions.
        cost: median time of a step, drawing its batches included, of the uncompressed time.
        cosine: between the mean gradient and the uncompressed one: readable, and not corrected for scatter.
        steps: that were compared.
        bias2_error: standard error of `bias2`; NaN where it is not known.
    """

    progress: float
    compression: Compression
    tokens_share: float
    bias2: float
    variance: float
    cost: float
    cosine: float
    steps: int
    bias2_error: float = math.nan

    @property
    def ca_mse(self) -> float:
        """Cost-adjusted mean squared error."""
        return self.bias2 + self.cost * self.variance


def squared_bias(differences: Floats) -> float:
    """Unbiased estimate of the squared norm of the mean difference, from J independent ones (J, M).

    Steps are split into halves A and B without a case in common, and (mean of A) . (mean of B) has no scatter in it,
    which ||mean||² has: that one is too large by variance / J for every compression. This is the mean over all ways of
    halving, in closed form. It can be negative, where there is little or no bias.

    Raises:
        ValueError: fewer than two.
    """
    J = len(differences)
    if J < 2:
        raise ValueError(f"a squared bias needs two independent steps or more, got {J}")
    own = float((differences**2).sum())
    return float((differences.sum(axis=0) ** 2).sum() - own) / (J * (J - 1))


def squared_bias_error(differences: Floats) -> float:
    """Standard error of `squared_bias` by the jackknife, (J, M); NaN for fewer than three steps."""
    J = len(differences)
    if J < 3:
        return math.nan
    own = (differences**2).sum(axis=1)
    sums = differences.sum(axis=0) - differences  # without each step in turn
    left = ((sums**2).sum(axis=1) - (own.sum() - own)) / ((J - 1) * (J - 2))
    return math.sqrt((J - 1) * float(left.var()))


def total_variance(gradients: Floats) -> float:
    """Unbiased variance summed over directions, (J, M)."""
    return float(gradients.var(axis=0, ddof=1).sum())


def cosine(first: Floats, second: Floats) -> float:
    """Of the angle between two vectors (M,); NaN where one is zero."""
    norms = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / norms if norms else float("nan")


class Projection:
    """A fixed random projection of a whole gradient that keeps squared norms and inner products on average.

    Of the whole: one block or the patch embedding alone would show only what happens there, and larger patches are off
    most where they are embedded, fewer tokens where they are pooled.

    Every entry is added, with a random sign, to one of the dimensions (feature hashing, Weinberger et al. 2009, arXiv
    0902.2206): no matrix is held, signs and places are drawn anew from the seed, a piece at a time. A gradient with no
    more entries than dimensions is left as it is.

    Args:
        dimensions: M at most.
        seed: the same seed is the same projection.
        piece: entries at once.
    """

    def __init__(self, dimensions: int = DIMENSIONS, seed: int = 0, piece: int = 2**20) -> None:
        self.dimensions, self.seed, self.piece = dimensions, seed, piece

    def __call__(self, gradients: Sequence[Tensor]) -> Floats:
        """Tensors of any shapes, in a fixed order -> (M,)."""
        if sum(one.numel() for one in gradients) <= self.dimensions:
            return torch.cat([one.detach().flatten().double().cpu() for one in gradients]).numpy()
        generator = torch.Generator().manual_seed(self.seed)
        result = torch.zeros(self.dimensions, dtype=torch.float64)
        for gradient in gradients:
            for piece in torch.split(gradient.detach().flatten().cpu(), self.piece):
                drawn = torch.randint(2 * self.dimensions, (len(piece),), generator=generator)
                result.index_add_(0, drawn // 2, piece.double() * (1 - 2 * (drawn % 2)))
        return result.numpy()


def derive_schedule(errors: Sequence[GradientError], until: float = 1.0) -> tuple[AccelerationStep, ...]:
    """The schedule with the least cost-adjusted MSE among those whose tokens never become fewer.

    At each point that is the compression with the least, where these are in order; where they are not, the order with
    the least sum, each point in units of its own uncompressed error. A compression holds from halfway after the point
    before, and from `UNCOMPRESSED_FROM` of `until` on nothing is left out. One step from 0 on means that compression
    does not pay.

    Args:
        errors: of the same compressions at one point or more, the uncompressed one among them.
        until: progress, 0..1, at which the backbone ends to learn (`Config.learns_until`).

    Raises:
        ValueError: a point lacks a compression that another one has.
    """
    points = sorted({error.progress for error in errors})
    table = {(error.progress, error.compression): error for error in errors}
    ranked = sorted({e.compression: e.tokens_share for e in errors}.items(), key=lambda item: item[1])
    compressions = [compression for compression, _ in ranked]
    if missing := [(point, one) for point in points for one in [NONE, *compressions] if (point, one) not in table]:
        raise ValueError(f"every compression is needed at every point, and the uncompressed one; missing: {missing}")

    def relative(point: float, one: Compression) -> float:
        return table[point, one].ca_mse / table[point, NONE].ca_mse

    share = dict(ranked)
    orders: dict[Compression, tuple[float, tuple[Compression, ...]]] = dict.fromkeys(compressions, (0.0, ()))
    for point in points:  # the best order that ends with each compression, from those that end one point before
        ended = orders
        orders = {}
        for one in compressions:
            allowed = [order for last, order in ended.items() if share[last] <= share[one] * (1 + 1e-9)]
            total, order = min(allowed, key=itemgetter(0))
            orders[one] = total + relative(point, one), (*order, one)
    _, best = min(orders.values(), key=itemgetter(0))
    begins = [0.0, *((before + after) / 2 for before, after in pairwise(points))]
    whole = UNCOMPRESSED_FROM * until
    held = [(begin, one) for begin, one in zip(begins, best, strict=True) if begin < whole]
    held.append((whole, NONE))
    changes = [held[0], *(after for before, after in pairwise(held) if after[1] != before[1])]
    return tuple(AccelerationStep(from_progress=begin, keep=one.keep, patch=one.patch) for begin, one in changes)
