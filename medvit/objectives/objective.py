"""What the loop trains: a module that owns the model and everything else that is learned or remembered.

A loss is a sum over cases divided by `batch["totals"]`, which the loop has summed over the batches of one optimizer
step and over all processes: the gradient is that of one large batch, however it was cut up, class weights included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from medvit.models.backbone import Backbone
from medvit.models.classifier import CtClassifier

UNLABELLED = -1
"""`label` of a case that is trained on without one: a target case."""

Batch = Mapping[str, Tensor]
"""`input` (B, S, C, H, W) or (B, S, D), `mask` (B, S), `label` (B,), `domain` (B,), `index` (B,), `totals` (T,).

For pretraining (`medvit.data.slice_views`) `input` is (B, S, V, C, H, W), V views of each slice; with small crops there
is `local` (B, S, L, C, h, w); and `patient` (B,) is the number of each case's patient."""


class Task(NamedTuple):
    """What is learned: `counts` (K,) labelled training cases per class, and how many `domains` (sites) there are."""

    counts: tuple[int, ...]
    domains: int = 1


class Objective(nn.Module):
    """A way to learn.

    Everything random in `forward` comes from torch's global generator, which the loop seeds for each step.
    """

    classifier: CtClassifier

    patches_vary = True
    """Whether slices may be embedded by patches of another size than the model's own."""

    def totals(self, batch: Batch) -> Tensor:
        """What this batch adds to each normaliser of the loss, (T,); `totals` is not yet in the batch."""
        return batch["label"].new_tensor([len(batch["label"])], dtype=torch.float32)

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch.

        Args:
            batch: with `totals`: the sum over all batches of this optimizer step and all processes, divided by the
                number of processes (whose gradients are averaged).
            progress: 0..1 over the whole training, per step.

        Returns:
            `loss`; `logits` (B, K) perhaps; all else is a scalar to be logged, detached.
        """
        raise NotImplementedError

    def rate_of(self, name: str) -> float:
        """How many times as fast as pooling and head a parameter learns that is not the backbone's."""
        return 1.0

    def after_step(self) -> None:
        """Called after each optimizer step."""

    def complete(self, progress: float) -> bool:
        """Whether a model that has come so far, 0..1, may be kept: it has met slices as it will be shown them."""
        return True

    def set_size(self, px: int) -> int:
        """Take slices of another size: what beside the classifier has one must follow. See `Backbone.set_size`."""
        return self.classifier.set_size(px)

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """What of the backbone learns: see `Backbone.set_trainable`. An objective may hold back more."""
        self.classifier.set_trainable(trainable, blocks)

    def encoder(self) -> Backbone:
        """The backbone that is judged and kept."""
        return self.classifier.backbone
