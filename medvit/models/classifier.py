"""Backbone, pooling and head as one module: slices of a study -> class logits, and the weight of each slice."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone, WeightReport, build_backbone
from medvit.models.pooling import POOLINGS


class Output(NamedTuple):
    """`logits` (B, K) and `weights` (B, S): how much each slice counted, summing to 1."""

    logits: Tensor
    weights: Tensor


class CtClassifier(nn.Module):
    """Study classifier.

    Args:
        backbone: slices -> features.
        config: pooling and head.
        classes: K.
    """

    def __init__(self, backbone: Backbone, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        # features of a pretrained trunk differ in scale by orders of magnitude: without this the head learns slowly
        self.norm = nn.LayerNorm(backbone.width)
        self.pooling = POOLINGS[config.pooling](backbone.width, config.pooling_width)
        self.head = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(backbone.width, classes))
        self.frozen = False

    def forward(self, values: Tensor, mask: Tensor) -> Output:
        """Slices (B, S, C, H, W), or features already computed (B, S, D); mask (B, S)."""
        features = values if values.ndim == 3 else self._encode(values, mask)
        pooled, weights = self.pooling(self.norm(features), mask)
        return Output(self.head(pooled), weights)

    def _encode(self, slices: Tensor, mask: Tensor) -> Tensor:
        """Only real slices go through the backbone: (B, S, C, H, W) -> (B, S, D), zeros where padded."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            encoded: Tensor = self.backbone(slices[mask])
        features = encoded.new_zeros((*mask.shape, encoded.shape[-1]))
        features[mask] = encoded
        return features

    def freeze_backbone(self, frozen: bool) -> None:
        """Freeze or thaw the backbone: while frozen no gradient, and never in training mode (dropout, statistics)."""
        self.frozen = frozen
        self.backbone.requires_grad_(not frozen)
        self.train(self.training)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, all)."""
        counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in self.parameters()]
        return sum(t for t, _ in counts), sum(n for _, n in counts)


def build_classifier(
    config: ModelConfig, *, size: int, channels: int, classes: int
) -> tuple[CtClassifier, WeightReport]:
    """Create backbone, pooling and head.

    Raises:
        UsageError: as `build_backbone`.
    """
    backbone, report = build_backbone(config, size=size, channels=channels)
    return CtClassifier(backbone, config, classes), report
