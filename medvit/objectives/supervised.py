"""Cross-entropy on labelled studies, classes weighted by their rarity in the training split.

One formula serves hard labels, label smoothing, mixed cases and focal loss, because all of them are soft targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier, Output
from medvit.objectives.mixing import Mixed, Mixing
from medvit.objectives.objective import UNLABELLED, Batch, Objective, Task


class Learned(NamedTuple):
    """What learning from labels gives, and what adaptation goes on with.

    `loss` is a sum over the labelled cases, `logits` (L, K) are theirs; `output` is of all cases, `mixed` as it was.
    """

    loss: Tensor
    logits: Tensor
    output: Output
    mixed: Mixed


class ClassLearning(nn.Module):
    """Mixes a batch, classifies all of it at once and sums the loss of its labelled cases.

    Args:
        config: weighting, smoothing, focus and mixing.
        task: cases per class in the training split; never from other splits.
    """

    def __init__(self, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.mixing = Mixing(config)
        self.smoothing, self.gamma = config.label_smoothing, config.focal_gamma
        weights = class_weights(task.counts) if config.class_weights else torch.ones(len(task.counts))
        self.weights: Tensor
        self.register_buffer("weights", weights)

    def total(self, label: Tensor) -> Tensor:
        """(B,) -> sum of the class weights of the labelled cases. Mixing leaves it as it is."""
        return self.weights[label[label != UNLABELLED]].sum()

    def forward(self, classifier: CtClassifier, batch: Batch) -> Learned:
        """Both labelled and unlabelled cases go through the classifier in one forward."""
        mixed = self.mixing(batch)
        output = classifier(mixed.values, batch["mask"])
        labelled = batch["label"] != UNLABELLED
        logits = output.logits[labelled]
        targets = mixed.targets(batch["label"], len(self.weights))[labelled]
        loss = cross_entropy(logits, targets, self.weights, smoothing=self.smoothing, gamma=self.gamma)
        return Learned(loss, logits, output, mixed)


class Supervised(Objective):
    """Cross-entropy alone.

    Args:
        classifier: the model.
        config: as `ClassLearning`.
        task: as `ClassLearning`.
    """

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.classifier = classifier
        self.learning = ClassLearning(config, task)

    def totals(self, batch: Batch) -> Tensor:
        """Sum of the class weights, (1,)."""
        return self.learning.total(batch["label"])[None]

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch; `logits` of its labelled cases."""
        learned = self.learning(self.classifier, batch)
        return {"loss": learned.loss / batch["totals"][0], "logits": learned.logits}


def cross_entropy(logits: Tensor, targets: Tensor, weights: Tensor, *, smoothing: float, gamma: float) -> Tensor:
    """Sum over cases of -sum_k t_k w_k (1 - p_k)^gamma log p_k, where t are the smoothed targets.

    With gamma 0 and hard labels this is torch's weighted cross-entropy with label smoothing before it is divided by the
    sum of the weights of the labels. With hard labels, unsmoothed, it is the focal loss of Lin et al. 2017 (arXiv
    1708.02002).

    Args:
        logits: (L, K).
        targets: (L, K), each row summing to 1.
        weights: (K,) of the classes.
        smoothing: share of each target that is spread over all classes, 0..1.
        gamma: how much less well classified cases count; 0: not.
    """
    targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
    log_p = logits.log_softmax(dim=1)
    loss = -targets * weights * log_p
    if gamma > 0:
        # not exactly 0 for a certain case: the gradient of 0^gamma is infinite where gamma < 1
        missing = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).eps)
        loss = loss * missing**gamma
    return loss.sum()


def class_weights(counts: Sequence[int]) -> Tensor:
    """Inverse frequency, (K,), scaled so that the weights average to 1 over the cases.

    Raises:
        ValueError: a class without cases.
    """
    if min(counts) < 1:
        raise ValueError(f"class weights need a case of each class, got counts {list(counts)}")
    totals = torch.tensor(counts, dtype=torch.float32)
    return totals.sum() / (len(counts) * totals)
