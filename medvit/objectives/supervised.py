"""Cross-entropy on labelled studies, classes weighted by their rarity in the training split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier

Batch = Mapping[str, Tensor]
"""`input` (B, S, C, H, W) or (B, S, D), `mask` (B, S), `label` (B,), `index` (B,)."""


class Objective(nn.Module):
    """What the loop trains: owns the model (`classifier`) and everything else that is learned or remembered."""

    classifier: CtClassifier

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch under the key `loss`; `progress` is 0..1 over the whole training."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each optimizer step."""


class Supervised(Objective):
    """Weighted cross-entropy.

    Args:
        classifier: the model.
        config: weighting and label smoothing.
        counts: (K,) cases per class in the training split; never from other splits.
    """

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, counts: Sequence[int]) -> None:
        super().__init__()
        self.classifier = classifier
        self.label_smoothing = config.label_smoothing
        weights = class_weights(counts) if config.class_weights else torch.ones(len(counts))
        self.weights: Tensor
        self.register_buffer("weights", weights)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch."""
        logits = self.classifier(batch["input"], batch["mask"]).logits
        loss = nn.functional.cross_entropy(
            logits, batch["label"], weight=self.weights, label_smoothing=self.label_smoothing
        )
        return {"loss": loss, "logits": logits}


def class_weights(counts: Sequence[int]) -> Tensor:
    """Inverse frequency, (K,), scaled so that the weights average to 1 over the cases.

    Raises:
        ValueError: a class without cases.
    """
    if min(counts) < 1:
        raise ValueError(f"class weights need a case of each class, got counts {list(counts)}")
    totals = torch.tensor(counts, dtype=torch.float32)
    return totals.sum() / (len(counts) * totals)
