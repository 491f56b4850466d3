"""Backbone, pooling and head as one module: slices of a study -> class logits, and the weight of each slice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone, build_backbone
from medvit.models.pooling import POOLINGS
from medvit.models.tuning import TUNINGS
from medvit.models.weights import WeightReport
from medvit.records import UsageError


class Output(NamedTuple):
    """`logits` (B, K), `weights` (B, S): how much each slice counted, summing to 1, and `pooled` (B, D) features."""

    logits: Tensor
    weights: Tensor
    pooled: Tensor


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
        self.head = HEADS[config.head](config, backbone.width, classes)

    def forward(self, values: Tensor, mask: Tensor) -> Output:
        """Slices (B, S, C, H, W), or what was computed of them: (B, S, D) features, or what `Backbone.trunk` gave.

        Args:
            values: of the slices.
            mask: (B, S), true where there is a slice.
        """
        features = values if values.ndim == 3 else self._encode(values, mask)
        pooled, weights = self.pooling(self.norm(features), mask)
        return Output(self.head(pooled), weights, pooled)

    def _encode(self, values: Tensor, mask: Tensor) -> Tensor:
        """Only real slices go through the backbone: (B, S, ...) -> (B, S, D), zeros where padded."""
        encode = self.backbone if values.ndim == 5 else self.backbone.finish
        learns = any(parameter.requires_grad for parameter in self.backbone.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            encoded: Tensor = encode(values[mask])
        features = encoded.new_zeros((*mask.shape, encoded.shape[-1]))
        features[mask] = encoded
        return features

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int = 3) -> None:
        """What of the backbone learns beside norm, pooling and head: see `Backbone.set_trainable`."""
        self.backbone.set_trainable(trainable, blocks)
        self.train(self.training)

    def set_size(self, px: int) -> int:
        """Take slices of another size; returns the one taken, px: see `Backbone.set_size`."""
        return self.backbone.set_size(px)

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep few activations and compute them twice: see `Backbone.set_gradient_checkpointing`."""
        self.backbone.set_gradient_checkpointing(on)

    def parameter_counts(self) -> tuple[int, int]:
        """(trainable, all)."""
        counts = [(p.numel() if p.requires_grad else 0, p.numel()) for p in self.parameters()]
        return sum(t for t, _ in counts), sum(n for _, n in counts)


def _linear(config: ModelConfig, width: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(config.dropout), nn.Linear(width, classes))


def _mlp(config: ModelConfig, width: int, classes: int) -> nn.Sequential:
    if config.dropout:
        raise UsageError("model.dropout is of the linear head; model.head mlp has 0.5 and 0.3. Leave one of them out.")
    # no BatchNorm: a last batch may be of one study
    return nn.Sequential(nn.Dropout(0.5), nn.Linear(width, 512), nn.GELU(), nn.Dropout(0.3), nn.Linear(512, classes))


HEADS: dict[Literal["linear", "mlp"], Callable[[ModelConfig, int, int], nn.Sequential]] = {
    "linear": _linear,
    "mlp": _mlp,
}


def build_classifier(
    config: ModelConfig, *, size: int, channels: int, classes: int
) -> tuple[CtClassifier, WeightReport]:
    """Create backbone, pooling and head.

    Raises:
        UsageError: as `build_backbone`.
    """
    backbone, report = build_backbone(config, size=size, channels=channels, kind=TUNINGS[config.tuning])
    return CtClassifier(backbone, config, classes), report
