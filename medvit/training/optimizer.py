"""What moves how fast: parameter groups with their peak rates, and the course of the rate over a stage."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from medvit.config import Stage
from medvit.models.depth import block_levels
from medvit.objectives import Objective

BACKBONE = "classifier.backbone."
"""How names of the backbone's parameters begin within an objective."""

KINDS = ("other", "head", "backbone")
"""Names of parameter groups, in the order in which they come."""

LAYER_RATES: dict[Literal["flat", "decay", "multiplier"], Callable[[Stage, int, int], float]] = {
    "flat": lambda _stage, _below, _level: 1.0,
    "decay": lambda stage, below, _level: stage.layer_decay**below,
    "multiplier": lambda _stage, _below, level: 0.1 if level == 0 else 0.5 if level <= 2 else 1.0,
}
"""Name in the config -> (stage, levels below the top block, level from 0 for embeddings) -> share of the peak rate."""


def parameter_groups(objective: Objective, stage: Stage) -> list[dict[str, Any]]:
    """Trainable parameters, each in exactly one group: by rate, and decayed or not.

    Pooling and head are named `head`, and `other` what the objective has beside the classifier (a discriminator) and
    wants to learn at a rate of its own. Groups named `backbone` come last and in rising order of their rates: the last
    one is the top block's. Only weight matrices and kernels are decayed: no bias, norm, token, position embedding or
    LayerScale.

    Raises:
        UsageError: layer-wise rates for a model whose blocks timm does not tell apart.
    """
    backbone = objective.classifier.backbone
    names = {id(parameter): name for name, parameter in backbone.model.named_parameters()}
    rates = _backbone_rates(objective, stage)
    spared = backbone.no_weight_decay()
    groups: dict[tuple[int, float, bool], list[nn.Parameter]] = {}
    for name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            inside = names.get(id(parameter))
            decayed = name.endswith("weight") and parameter.ndim > 1 and inside not in spared
            share = objective.rate_of(name)
            kind = "backbone" if inside else "head" if share == 1 else "other"
            rate = rates[inside] if inside else share * stage.lr
            groups.setdefault((KINDS.index(kind), rate, decayed), []).append(parameter)
    return [
        {
            "name": KINDS[kind],
            "params": members,
            "lr": rate,
            "weight_decay": stage.weight_decay if decayed else 0.0,
        }
        for (kind, rate, decayed), members in sorted(groups.items(), key=lambda item: item[0])
    ]


def _backbone_rates(objective: Objective, stage: Stage) -> dict[str, float]:
    """Peak rate of each of the backbone's parameters; its top block has `backbone_lr`."""
    peak = stage.backbone_lr if stage.backbone_lr is not None else stage.lr / 10
    model = objective.classifier.backbone.model
    if stage.layer_rates == "flat":  # of any model, whether its blocks are told apart or not
        return {name: peak for name, _ in model.named_parameters()}
    levels = block_levels(model)
    top = max(levels.values())
    share = LAYER_RATES[stage.layer_rates]
    return {name: peak * share(stage, top - level, level) for name, level in levels.items()}


def course(stage: Stage, steps: int) -> Callable[[int], float]:
    """Factor on each group's peak rate at a step: linear warm-up, then cosines down to `min_lr`, then flat.

    The first step is already above zero; with `restarts` each cycle starts at the peak, and the last one ends with the
    stage at `min_lr` (SGDR, Loshchilov and Hutter 2017, arXiv 1608.03983). No group rises again past the end.
    """
    warm = min(round(stage.warmup * steps), steps - 1)  # one step at least is at the peak
    ends = [warm + end for end in CYCLES[stage.schedule](stage, steps - warm)]

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        cycle = min(bisect_right(ends, step), len(ends) - 1)
        start = ends[cycle - 1] if cycle else warm
        done = min(1.0, (step - start) / max(1, ends[cycle] - 1 - start))
        return stage.min_lr + (1 - stage.min_lr) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def _restarts(stage: Stage, steps: int) -> list[int]:
    """As many whole cycles as come nearest to the epochs of the stage, made longer or shorter to fill it exactly."""
    ends = [1]  # of cycles, in lengths of the first one
    while len(ends) < steps // 2:  # the last cycle comes down in two steps at least
        following = ends[-1] + stage.restart_factor ** len(ends)
        if following * ends[-1] * stage.restart_epochs**2 > stage.epochs**2:  # one more is farther off, as a ratio
            break
        ends.append(following)
    return [round(steps * end / ends[-1]) for end in ends]


CYCLES: dict[Literal["cosine", "restarts"], Callable[[Stage, int], list[int]]] = {
    "cosine": lambda _stage, steps: [steps],
    "restarts": _restarts,
}
"""Name in the config -> (stage, steps after the warm-up) -> the step at which each cosine ends."""
