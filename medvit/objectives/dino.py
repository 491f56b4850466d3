"""DINO: what a slow teacher says of large crops, a student learns to say of every crop.

No negatives, so nothing has to be known of patients; a centre and a low temperature keep the teacher from saying the
same of everything. Features are gathered over processes before the head, as `medvit.objectives.contrastive` does.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.backbone import Backbone
from medvit.models.classifier import CtClassifier
from medvit.models.crops import any_size
from medvit.objectives.gathering import processes
from medvit.objectives.objective import Batch, Objective, Task
from medvit.objectives.selfsupervised import (
    cosine_momentum,
    encode_views,
    follow,
    slices_of,
    slow_backbone,
    slow_copy,
    train_backbone_only,
)

BOTTLENECK = 256
"""Width before the prototypes, as in the paper."""


class DinoHead(nn.Module):
    """Features (N, D) -> outputs (N, K): three layers with GELU, length 1, prototypes of length 1.

    The last layer is weight-normalised without a length to learn: free lengths are one way to collapse. Hidden layers
    have batch normalisation, which the paper leaves out with a ViT and its authors' code has as an option: in trials of
    some hundred steps on digits and on phantoms, outputs stayed alike without it, for features have most in common.

    Args:
        width: D.
        hidden: units of the two hidden layers.
        prototypes: K.
    """

    def __init__(self, width: int, hidden: int, prototypes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(width, hidden, bias=False), nn.BatchNorm1d(hidden), nn.GELU()),
            *(nn.Linear(hidden, hidden, bias=False), nn.BatchNorm1d(hidden), nn.GELU()),
            nn.Linear(hidden, BOTTLENECK),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
        self.prototypes = nn.Linear(BOTTLENECK, prototypes, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, K), cosines."""
        directions = nn.functional.normalize(self.layers(features), dim=-1)
        return nn.functional.linear(directions, nn.functional.normalize(self.prototypes.weight, dim=-1))


class Dino(Objective):
    """DINO (Caron et al. 2021, arXiv 2104.14294), with small crops or without.

    The teacher is never trained: after each step it moves a little towards the student. It is part of the state, takes
    the student's size, has no dropout, and is what is judged and kept: it is the better of the two.

    Logged: `momentum`, `teacher_temperature`, and `teacher_entropy` of its outputs, from 0 (one output for a slice) to
    the log of the number of prototypes (all alike). Either end for long is a collapse.

    Args:
        classifier: whose backbone is the student.
        config: temperatures, momentum, prototypes.
        task: not used.
    """

    center: Tensor
    collected: Tensor

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.classifier, self.settings = classifier, config.pretraining
        train_backbone_only(classifier)
        self.head = DinoHead(classifier.backbone.width, self.settings.hidden, self.settings.prototypes)
        self.slow_backbone, self.slow_head = slow_backbone(classifier.backbone), slow_copy(self.head)
        self.register_buffer("center", torch.zeros(self.settings.prototypes))
        # sum and number of outputs since the last step, of all its micro-batches and processes
        self.register_buffer("collected", torch.zeros(self.settings.prototypes + 1))
        self.momentum = self.settings.momentum

    def set_size(self, px: int) -> int:
        """The teacher follows."""
        self.slow_backbone.set_size(px)
        return super().set_size(px)

    def encoder(self) -> Backbone:
        """The teacher's."""
        return self.slow_backbone

    def totals(self, batch: Batch) -> Tensor:
        """Number of slices, (1,)."""
        return batch["mask"].sum()[None].float()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch."""
        slices, settings = slices_of(batch), self.settings
        self.momentum = cosine_momentum(settings.momentum, progress)
        temperature = warm_up(*settings.teacher_temperature, settings.teacher_warmup, progress)
        with torch.no_grad():
            taught = _say(self.slow_head, encode_views(self.slow_backbone, slices.views))  # (2, M, K)
            self._collect(taught)
        features = encode_views(self.classifier.backbone, slices.views)
        if slices.local is not None:
            with any_size(self.classifier.backbone):
                features = torch.cat([features, encode_views(self.classifier.backbone, slices.local)], dim=1)
        said = _say(self.head, features)
        losses = dino_losses(taught, said, self.center, temperature, settings.temperature)
        sure = ((taught - self.center) / temperature).softmax(dim=-1)
        return {
            "loss": losses.sum() / (batch["totals"][0] * processes()),  # every process has the losses of all
            "momentum": losses.new_tensor(self.momentum),
            "teacher_temperature": losses.new_tensor(temperature),
            "teacher_entropy": torch.special.entr(sure).sum(dim=-1).mean(),
        }

    def after_step(self) -> None:
        """Move the teacher, and the centre towards the mean of its outputs in this step."""
        follow(self.slow_backbone, self.classifier.backbone, self.momentum)
        follow(self.slow_head, self.head, self.momentum)
        self.center.lerp_(self.collected[:-1] / self.collected[-1], 1 - self.settings.center_momentum)
        self.collected.zero_()

    def _collect(self, taught: Tensor) -> None:
        rows = taught.flatten(0, 1).to(self.collected.dtype)
        self.collected += torch.cat([rows.sum(dim=0), rows.new_tensor([len(rows)])])


def dino_losses(taught: Tensor, said: Tensor, center: Tensor, teacher: float, student: float) -> Tensor:
    """Cross-entropy of what the student says under what the teacher says, mean over pairs of different views.

    Args:
        taught: (T, N, K) outputs of the teacher.
        said: (V, N, K) outputs of the student; the first T are of the teacher's views.
        center: (K,) that is taken off the teacher's outputs.
        teacher: its temperature.
        student: likewise.

    Returns:
        (N,)
    """
    targets = ((taught - center) / teacher).softmax(dim=-1)
    logs = (said / student).log_softmax(dim=-1)
    pairs = [(t, v) for t, v in product(range(len(taught)), range(len(said))) if t != v]
    return torch.stack([-(targets[t] * logs[v]).sum(dim=-1) for t, v in pairs]).mean(dim=0)


def warm_up(begin: float, end: float, share: float, progress: float) -> float:
    """From `begin` to `end` in the first `share` of the training, then flat."""
    return end if progress >= share else begin + (end - begin) * progress / share


def _say(head: nn.Module, features: Tensor) -> Tensor:
    """Features of all crops at once (M, V, D) -> (V, M, K)."""
    outputs: Tensor = head(features.flatten(0, 1))
    return outputs.view(*features.shape[:2], -1).transpose(0, 1)
