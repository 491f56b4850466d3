"""SimCLR and MoCo v3: two views of a slice are alike, and unlike the slices of other patients.

Slices of one patient are never negatives. They show the same person, often the same organ a few millimetres on: to push
them apart is to teach that the same is different. They are left out of the comparison, and how many were is logged.

Backbone features are gathered over processes before the projection head: its batch normalisation and the comparison see
one batch, and gradients are those of one process with all of it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from medvit.config import ObjectiveConfig
from medvit.models.classifier import CtClassifier
from medvit.objectives.gathering import gather_rows, processes
from medvit.objectives.objective import Batch, Objective, Task
from medvit.objectives.selfsupervised import (
    cosine_momentum,
    encode_views,
    follow,
    mlp,
    slices_of,
    slow_backbone,
    slow_copy,
    train_backbone_only,
)
from medvit.records import UsageError


class Contrast(NamedTuple):
    """`losses` (A,) of anchors; how many `pairs` of one patient were left out; `negatives` of an anchor, on average."""

    losses: Tensor
    pairs: Tensor
    negatives: Tensor


def nt_xent(first: Tensor, second: Tensor, patients: Tensor, temperature: float) -> Contrast:
    """Normalised temperature-scaled cross-entropy of two views (Chen et al. 2020, arXiv 2002.05709, equation 1).

    Each of 2N embeddings has the other view of its slice to find among those of all other patients.

    Args:
        first: (N, D) embeddings of the one view, of any length.
        second: (N, D) of the other.
        patients: (N,) number of each slice's patient.
        temperature: by which cosines are divided.

    Returns:
        the loss of each of 2N anchors, `first` before `second`.
    """
    rows = nn.functional.normalize(torch.cat([first, second]), dim=1)
    count = len(first)
    positive = torch.arange(2 * count, device=rows.device).roll(count)
    return _contrast(rows, rows, positive, patients.repeat(2), patients.repeat(2), temperature, itself=True)


def info_nce(queries: Tensor, keys: Tensor, patients: Tensor, temperature: float) -> Contrast:
    """InfoNCE (van den Oord et al. 2018, arXiv 1807.03748): each query has its key to find among other patients' keys.

    Args:
        queries: (N, D), of any length.
        keys: (N, D) of the same slices, of any length.
        patients: (N,) number of each slice's patient.
        temperature: by which cosines are divided.
    """
    anchors, others = (nn.functional.normalize(rows, dim=1) for rows in (queries, keys))
    positive = torch.arange(len(queries), device=queries.device)
    return _contrast(anchors, others, positive, patients, patients, temperature, itself=False)


def _contrast(
    anchors: Tensor,
    others: Tensor,
    positive: Tensor,
    patients: Tensor,
    other_patients: Tensor,
    temperature: float,
    *,
    itself: bool,
) -> Contrast:
    """`positive` (A,): which of the others is each anchor's; `itself`: the others are the anchors."""
    same = patients[:, None] == other_patients[None]  # (A, M)
    excluded = same.scatter(1, positive[:, None], False)
    logits = (anchors @ others.T / temperature).masked_fill(excluded, -torch.inf)
    losses = logits.logsumexp(dim=1) - logits.gather(1, positive[:, None])[:, 0]
    pairs = excluded.sum() - (len(anchors) if itself else 0)
    return Contrast(losses, pairs.float(), (~same).float().sum(dim=1).mean())


class SimClr(Objective):
    """SimCLR (Chen et al. 2020, arXiv 2002.05709).

    Logged: `masked_pairs`, how many pairs of slices of one patient were not taken for negatives, and `negatives`, how
    many an anchor had.

    Args:
        classifier: whose backbone is trained.
        config: temperature, and widths of the projection head.
        task: not used.
    """

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        self.classifier, self.temperature = classifier, config.pretraining.temperature
        train_backbone_only(classifier)
        widths = (classifier.backbone.width, config.pretraining.hidden, config.pretraining.width)
        self.projector = mlp(widths, last_norm=False)

    def totals(self, batch: Batch) -> Tensor:
        """Number of anchors, (1,)."""
        return 2 * batch["mask"].sum()[None].float()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch, over the slices of all processes."""
        slices = slices_of(batch)
        features = encode_views(self.classifier.backbone, slices.views)
        first, second = self.projector(features.flatten(0, 1)).view(*features.shape[:2], -1).unbind(1)
        found = nt_xent(first, second, gather_rows(slices.patients), self.temperature)
        # every process has the losses of all
        loss = found.losses.sum() / (batch["totals"][0] * processes())
        return {"loss": loss, "masked_pairs": found.pairs, "negatives": found.negatives}


class MoCoV3(Objective):
    """MoCo v3 (Chen, Xie and He 2021, arXiv 2104.02057): queries against keys of a slow copy, both ways round.

    The copy is never trained: after each step it moves a little towards what it is a copy of. It is part of the state,
    takes the size of the backbone, and has no dropout.

    Logged: as `SimClr`, and the `momentum`.

    Args:
        classifier: whose backbone is trained.
        config: temperature, momentum, widths of the heads, and whether the patch projection stays as it is.
        task: not used.
    """

    def __init__(self, classifier: CtClassifier, config: ObjectiveConfig, task: Task) -> None:
        super().__init__()
        settings = config.pretraining
        self.classifier, self.temperature, self.start = classifier, settings.temperature, settings.momentum
        train_backbone_only(classifier)
        hidden, width = settings.hidden, settings.width
        self.projector = mlp((classifier.backbone.width, hidden, hidden, width), last_norm=True)
        self.predictor = mlp((width, hidden, width), last_norm=True)
        self.slow_backbone, self.slow_projector = slow_backbone(classifier.backbone), slow_copy(self.projector)
        self.freeze_patches = settings.freeze_patches
        self._hold_back()
        self.momentum = self.start

    def set_size(self, px: int) -> int:
        """The copy follows."""
        self.slow_backbone.set_size(px)
        return super().set_size(px)

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """Perhaps all but the patch projection."""
        super().set_trainable(trainable, blocks)
        self._hold_back()

    def totals(self, batch: Batch) -> Tensor:
        """Number of slices, (1,)."""
        return batch["mask"].sum()[None].float()

    def forward(self, batch: Batch, progress: float) -> dict[str, Tensor]:
        """Loss of one batch, over the slices of all processes."""
        slices, self.momentum = slices_of(batch), cosine_momentum(self.start, progress)
        features = encode_views(self.classifier.backbone, slices.views)
        # view by view, as in the paper: each has statistics of its own
        queries = [self.predictor(self.projector(one)) for one in features.unbind(1)]
        with torch.no_grad():
            keys = [self.slow_projector(one) for one in encode_views(self.slow_backbone, slices.views).unbind(1)]
        patients = gather_rows(slices.patients)
        found = [info_nce(q, k, patients, self.temperature) for q, k in zip(queries, reversed(keys), strict=True)]
        # times 2 tau: the gradient does not grow as the temperature falls (its algorithm 1)
        loss = 2 * self.temperature * (found[0].losses.sum() + found[1].losses.sum())
        return {
            "loss": loss / (batch["totals"][0] * processes()),
            "masked_pairs": found[0].pairs + found[1].pairs,
            "negatives": found[0].negatives,
            "momentum": loss.new_tensor(self.momentum),
        }

    def after_step(self) -> None:
        """Move the copy."""
        follow(self.slow_backbone, self.classifier.backbone, self.momentum)
        follow(self.slow_projector, self.projector, self.momentum)

    def _hold_back(self) -> None:
        if not self.freeze_patches:
            return
        model = self.classifier.backbone.model
        if not hasattr(model, "patch_embed"):
            raise UsageError(
                f"objective.pretraining.freeze_patches: {type(model).__name__} has no patch projection. Set it to "
                "false."
            )
        model.patch_embed.requires_grad_(False)
