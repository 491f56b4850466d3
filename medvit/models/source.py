"""A pretrained model with the classifier it was pretrained with: what it takes a CT slice for.

That it calls a slice a jellyfish says nothing of the slice. Whether it calls slices with the finding otherwise than
slices without may say something of the weights (LEEP, `medvit.evaluation.transfer`).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from medvit.config import ModelConfig
from medvit.models.backbone import Backbone, create_model
from medvit.models.weights import load_weights, source_classes


class SourceClassifier(Backbone):
    """Slices (B, C, H, W) -> probabilities (B, Z) of the classes that the model was pretrained on.

    Args:
        model: timm model with its classifier.
        size: rows and columns it is built for, px.
    """

    def __init__(self, model: Any, size: int) -> None:
        super().__init__(model, ModelConfig(features="pooled"), size)
        self.width = int(model.num_classes)

    def forward(self, slices: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, Z)."""
        logits: Tensor = self.model(slices)
        return logits.softmax(dim=1)


def build_source_classifier(config: ModelConfig, *, size: int, channels: int) -> SourceClassifier | None:
    """Create the model with its own classifier; None where the weights bring none.

    Raises:
        UsageError: as `build_backbone`.
    """
    classes = source_classes(config)
    if not classes:
        return None
    model = create_model(config, size, channels, classes)
    load_weights(model, config, channels, classes)
    return SourceClassifier(model, size)
