"""What a prediction rests on: which slices, and which patches of them.

Three maps, of which only the last knows the class: the last block's attention; attention rollout, which follows it
through all blocks (Abnar and Zuidema 2020, arXiv 2005.00928); gradient rollout, which follows only what speaks for the
class (Chefer 2021, arXiv 2103.15679). A study is pooled from slices: its class score is followed back to the features
of each slice, and from there through the slice's blocks, so that maps of several slices are on one scale. None of them
is a finding; `medvit.evaluation.faithfulness` tells whether they are better than pointing at the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medvit.data.pipelines import Slices
from medvit.inference import Encoder
from medvit.models.backbone import Backbone
from medvit.models.watching import watched_attention

Floats = npt.NDArray[np.float32]
Method = Literal["attention", "rollout", "gradient"]

WATCHED_AT_ONCE = 8
"""Slices: every block's attention of each is kept, with its gradient."""


def last_attention(attention: Sequence[Tensor], _gradients: Sequence[Tensor]) -> Tensor:
    """Mean over heads of the last block's attention: (B, heads, N, N) per block -> (B, N, N)."""
    return attention[-1].mean(dim=1)


def rollout(attention: Sequence[Tensor], _gradients: Sequence[Tensor]) -> Tensor:
    """Product over blocks of mean attention plus the skip connection, rows of each factor summing to 1."""
    flow = torch.eye(attention[0].shape[-1])[None]
    for weights in attention:
        step = weights.mean(dim=1) + torch.eye(weights.shape[-1])
        flow = (step / step.sum(dim=-1, keepdim=True)) @ flow
    return flow


def gradient_rollout(attention: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """R = 1, then R + mean over heads of (gradient x attention, where positive) @ R, block by block; less 1 at the end.

    Without the 1 only what attention carried is left: that every token begins as itself says nothing about the class.
    """
    flow = start = torch.eye(attention[0].shape[-1])[None]
    for weights, gradient in zip(attention, gradients, strict=True):
        flow = flow + (weights * gradient).clamp(min=0).mean(dim=1) @ flow
    return flow - start


FLOWS: dict[Method, Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]] = {
    "attention": last_attention,
    "rollout": rollout,
    "gradient": gradient_rollout,
}
"""(attention, its gradients), one (B, heads, N, N) per block -> (B, N, N): how much token j went into final token i."""


def relevance_maps(
    encoder: Encoder,
    slices: Slices,
    features: Floats,
    target: int,
    at: Sequence[int],
    methods: Sequence[Method] = tuple(FLOWS),
) -> dict[Method, Floats]:
    """How much each patch of some slices had to do with the score of a class.

    The scores of all slices of a study are on one scale, so that they can be ranked together.

    Args:
        encoder: classifier and what it is shown; its backbone must be `watchable`.
        slices: int16 HU (S, H, H), those that the prediction looked at.
        features: (S, D) of them, as `encoder.encode` gives.
        target: class index.
        at: which of them to explain.
        methods: which maps.

    Returns:
        Method -> (len(at), rows, columns) of the grid of patches, 0 or more.

    Raises:
        UsageError: the backbone has no attention to watch.
    """
    towards, weights = _class_gradient(encoder, torch.as_tensor(features), target)
    parts: dict[Method, list[Tensor]] = {method: [] for method in methods}
    for start in range(0, len(at), WATCHED_AT_ONCE):
        some = list(at[start : start + WATCHED_AT_ONCE])
        for method, part in _watch(encoder, slices[some], towards[some], weights[some], methods).items():
            parts[method].append(part)
    shape = (len(at), *encoder.classifier.backbone.grid)
    return {method: torch.cat(part).numpy().reshape(shape) for method, part in parts.items()}


def _class_gradient(encoder: Encoder, features: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """Of the logit of a class less the mean of the others: gradient (S, D) by features (S, D); and slice weights (S,).

    Through pooling and head alone, so that no more than a few slices go through the backbone with gradients.
    """
    classifier = encoder.classifier
    device = next(classifier.parameters()).device
    with torch.enable_grad(), encoder.judging():
        leaf = features.to(device)[None].requires_grad_()
        output = classifier(leaf, torch.ones(leaf.shape[:2], dtype=torch.bool, device=device))
        logits = output.logits[0]
        others = [k for k in range(len(logits)) if k != target]
        (gradient,) = torch.autograd.grad(logits[target] - logits[others].mean(), leaf)
    return gradient[0].cpu(), output.weights[0].detach().cpu()


def _watch(
    encoder: Encoder, slices: Slices, towards: Tensor, weights: Tensor, methods: Sequence[Method]
) -> dict[Method, Tensor]:
    """Maps (B, patches) of slices (B, H, H), given the gradient (B, D) by their features and their weights (B,)."""
    backbone = encoder.classifier.backbone
    device = next(backbone.parameters()).device
    with torch.enable_grad(), encoder.judging(), watched_attention(backbone) as seen:
        values = encoder.values(slices).to(device).requires_grad_()  # a frozen backbone has gradients all the same
        score = (backbone(values) * towards.to(device)).sum()
        attention = list(seen)
        gradients = torch.autograd.grad(score, attention)  # by these alone: nothing is left in the weights
    kept = [one.detach().float().cpu() for one in attention]
    slopes = [one.float().cpu() for one in gradients]
    start, patches = _read_out(backbone, kept[0].shape[-1]), slice(backbone.prefix_tokens, None)
    flows = {name: FLOWS[name](kept, slopes) for name in methods}
    found = {name: torch.einsum("i,bij->bj", start, flow)[:, patches] for name, flow in flows.items()}
    # gradients know how much a slice counts; the other maps are told
    return {name: one if name == "gradient" else one * weights[:, None] for name, one in found.items()}


def _read_out(backbone: Backbone, tokens: int) -> Tensor:
    """(N,): the final token that maps begin at, CLS; the mean patch where there is none."""
    start = torch.zeros(tokens)
    if backbone.has_cls:
        start[0] = 1
    else:
        start[backbone.prefix_tokens :] = 1 / (tokens - backbone.prefix_tokens)
    return start
