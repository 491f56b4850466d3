"""Slices -> study: which slices decide, and how they are summed up.

A finding sits in a few slices; averaging over all of them drowns it, averaging over padding invents some. Every pooling
here takes a mask and never lets a padded slice count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn


class GatedAttention(nn.Module):
    """Gated attention pooling: weights = softmax(w · (tanh(V h) ⊙ sigmoid(U h))) (Ilse et al. 2018, arXiv 1802.04712).

    Args:
        features: D.
        width: of the hidden layers V and U.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.value = nn.Linear(features, width)
        self.gate = nn.Linear(features, width)
        self.score = nn.Linear(width, 1)

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, S) -> pooled (B, D), weights (B, S) that sum to 1 over unmasked slices."""
        hidden = torch.tanh(self.value(features)) * torch.sigmoid(self.gate(features))
        scores = self.score(hidden)[..., 0].masked_fill(~mask, float("-inf"))  # (B, S)
        weights = scores.softmax(dim=1)
        return torch.einsum("bs,bsd->bd", weights, features), weights


class MeanPooling(nn.Module):
    """Every slice counts alike."""

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, S) -> pooled (B, D), weights (B, S)."""
        weights = mask / mask.sum(dim=1, keepdim=True)
        return torch.einsum("bs,bsd->bd", weights.to(features.dtype), features), weights


class MaxPooling(nn.Module):
    """The largest value of each feature; a slice's weight is the share of features that it supplied."""

    def forward(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, S) -> pooled (B, D), weights (B, S)."""
        pooled, winner = features.masked_fill(~mask[..., None], float("-inf")).max(dim=1)
        shares = nn.functional.one_hot(winner, mask.shape[1]).float().mean(dim=1)
        return pooled, shares


POOLINGS: dict[Literal["attention", "mean", "max"], Callable[[int, int], nn.Module]] = {
    "attention": GatedAttention,
    "mean": lambda _features, _width: MeanPooling(),
    "max": lambda _features, _width: MaxPooling(),
}
