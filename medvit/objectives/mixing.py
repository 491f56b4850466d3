"""Mixup and CutMix on studies: each case of a batch is mixed with another one, and so is its label.

The partner is found by a permutation within the batch: every case gives away what it takes, so the sum of the class
weights, by which the loss is divided, stays what it was. Labelled cases are mixed with labelled ones, unlabelled with
unlabelled: a mixed case has a whole label or none, and mixing itself does not tell the two apart.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Beta

from medvit.config import ObjectiveConfig
from medvit.objectives.objective import UNLABELLED, Batch
from medvit.records import UsageError


class Mixed(NamedTuple):
    """`values` as the input of a batch, `partner` (B,) of each case, and the `share` of it that is still its own."""

    values: Tensor
    partner: Tensor
    share: float = 1.0

    def targets(self, index: Tensor, classes: int) -> Tensor:
        """Class (or domain) of each case (B,) -> what it is of each after mixing (B, K); zero where there is none."""
        own = nn.functional.one_hot(index.clamp_min(0), classes).float() * (index >= 0)[:, None]
        return torch.lerp(own[self.partner], own, self.share)


class Mixing(nn.Module):
    """Mixes batches while training. All that is random comes from torch's global generator.

    Args:
        config: `mixup` and `cutmix` are the parameter of a symmetric Beta distribution, 0 is off; with both on, each
            batch has one of them, with equal chance.
    """

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__()
        self.parameters_of = {mix: a for mix, a in ((mixup, config.mixup), (cutmix, config.cutmix)) if a > 0}

    def forward(self, batch: Batch) -> Mixed:
        """One share, and one box, for the whole batch; the batch itself is not written to.

        Raises:
            UsageError: CutMix of features, which have no rows and columns.
        """
        values, label = batch["input"], batch["label"]
        alone = torch.arange(len(label), device=label.device)
        if not self.training or not self.parameters_of:
            return Mixed(values, alone)
        if values.ndim < 5 and cutmix in self.parameters_of:
            raise UsageError(
                "objective.cutmix pastes boxes of pictures, and this training sees features that a frozen backbone has "
                "computed once. Set objective.cutmix=0 (objective.mixup works on features), or let a stage train the "
                "backbone."
            )
        partner = _partners(label)
        kinds = list(self.parameters_of)
        mix = kinds[int(torch.randint(len(kinds), ()))]
        parameter = torch.tensor(float(self.parameters_of[mix]))
        mixed, share = mix(values, values[partner], float(Beta(parameter, parameter).sample()))
        # a slice that its partner does not have stays as it is
        both = batch["mask"] & batch["mask"][partner] & (partner != alone)[:, None]  # (B, S)
        return Mixed(torch.where(both.view(*both.shape, *[1] * (values.ndim - 2)), mixed, values), partner, share)


def mixup(own: Tensor, theirs: Tensor, share: float) -> tuple[Tensor, float]:
    """Weighted mean of two inputs of one shape (Zhang et al. 2018, arXiv 1710.09412); also the share of the own."""
    return torch.lerp(theirs, own, share), share


def cutmix(own: Tensor, theirs: Tensor, share: float) -> tuple[Tensor, float]:
    """Paste a box of theirs into a copy of the own (Yun et al. 2019, arXiv 1905.04899).

    Args:
        own: (..., H, W); all slices have the same box.
        theirs: likewise.
        share: of the area that stays, were the whole box inside the picture.

    Returns:
        the copy, and the share of the area that did stay: the box is clipped at the borders.
    """
    H, W = own.shape[-2:]
    (top, bottom), (left, right) = _interval(H, share), _interval(W, share)
    pasted = own.clone()
    pasted[..., top:bottom, left:right] = theirs[..., top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (H * W)


def _interval(length: int, share: float) -> tuple[int, int]:
    """Begin and end of a box along one axis: any centre, length * sqrt(1 - share) long, clipped."""
    extent = round(length * (1 - share) ** 0.5)
    begin = int(torch.randint(length, ())) - extent // 2
    return max(begin, 0), min(begin + extent, length)


def _partners(label: Tensor) -> Tensor:
    """(B,) -> (B,): labelled and unlabelled cases, each permuted among themselves."""
    partner = torch.empty(len(label), dtype=torch.long, device=label.device)
    for side in (label != UNLABELLED, label == UNLABELLED):
        members = side.nonzero()[:, 0]
        partner[members] = members[torch.randperm(len(members)).to(label.device)]
    return partner
