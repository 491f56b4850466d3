"""Maximum mean discrepancy: how far apart two samples are, seen through a kernel.

Gretton et al. 2012 (JMLR 13, 723-773), lemma 6 for the unbiased and equation 5 for the biased estimate; several
bandwidths as in DAN (Long et al. 2015, arXiv 1502.02791). It is a loss, and a figure for reports.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

BANDWIDTHS = tuple(2.0**power for power in range(-3, 2))
"""Variances of the Gaussian kernels, in units of the median squared distance."""


def mmd2(x: Tensor, y: Tensor, *, kernel: Literal["rbf", "linear"] = "rbf", unbiased: bool = False) -> Tensor:
    """Squared maximum mean discrepancy of two samples, with gradient to both.

    The biased estimate compares each case with itself too: it is never negative, and above zero for two samples of one
    distribution, the more so the smaller they are. The unbiased one leaves these pairs out: it is zero on average where
    there is no difference, hence **below zero about as often as above**. That is no error, and it is not clipped: a
    clipped estimate would be biased again, and without gradient half of the time.

    Args:
        x: (N, D).
        y: (M, D).
        kernel: rbf: mean of Gaussian kernels, result 0..2 (biased), whatever the scale of the features; linear: inner
            product, so that the biased result is the squared distance of the means, in squared units of the features.
        unbiased: which estimate.

    Raises:
        ValueError: fewer than one case on a side, or fewer than two for the unbiased estimate.
    """
    if not has_estimate(len(x), len(y), unbiased=unbiased):
        raise ValueError(f"samples of {len(x)} and {len(y)} cases have no {'un' * unbiased}biased estimate")
    # in 32 bit at least: differences of 16-bit products are noise
    with torch.autocast(x.device.type, enabled=False):
        both = torch.cat([x, y])
        gram = KERNELS[kernel](both if both.dtype == torch.float64 else both.float())  # (N + M, N + M)
        N = len(x)
        mean = _mean_of_pairs if unbiased else torch.mean
        return mean(gram[:N, :N]) + mean(gram[N:, N:]) - 2 * gram[:N, N:].mean()


def has_estimate(first: int, second: int, *, unbiased: bool) -> bool:
    """Whether samples of these sizes are large enough: unbiased needs a pair of different cases on each side."""
    return min(first, second) >= (2 if unbiased else 1)


def _mean_of_pairs(gram: Tensor) -> Tensor:
    """Mean of a square matrix without its diagonal."""
    n = len(gram)
    return (gram.sum() - gram.diagonal().sum()) / (n * (n - 1))


def _rbf(both: Tensor) -> Tensor:
    """Mean over bandwidths of exp(-d² / 2 sigma²), sigma² around the median d² of all pairs, which is held constant.

    A fixed sigma would see nothing: squared distances of 768 features are hundreds, and exp(-hundreds) has no gradient.
    """
    # not by matrix products, where near cases are differences of large numbers; needs no (N, M, D) either
    squared = torch.cdist(both, both, compute_mode="donot_use_mm_for_euclid_dist").square()
    different = ~torch.eye(len(both), dtype=torch.bool, device=both.device)
    median = squared.detach()[different].median().clamp_min(torch.finfo(squared.dtype).tiny)
    kernels = [torch.exp(-squared / (2 * times * median)) for times in BANDWIDTHS]
    return torch.stack(kernels).mean(dim=0)


def _linear(both: Tensor) -> Tensor:
    return both @ both.T


KERNELS: dict[Literal["rbf", "linear"], Callable[[Tensor], Tensor]] = {"rbf": _rbf, "linear": _linear}
"""Name in the config -> (N, D) -> kernel of all pairs (N, N)."""
