"""How deep in a model a parameter lies: what is frozen below the top blocks, and what learns how fast, follow from it.

Depth is counted by timm's own matcher of block numbers, never by searching names: "blocks.1" is in "blocks.10" too.
"""

from __future__ import annotations

from typing import Any

from timm.models._manipulate import group_with_matcher
from torch import nn

from medvit.records import UsageError

_BEYOND = "\0"
"""A name that no pattern matches: what shares its level comes after all blocks."""


def block_levels(model: Any) -> dict[str, int]:
    """Level of each parameter of a timm model: 0 for embeddings and tokens, from 1 on the number of its block.

    What follows the last block (final norm, pooling) counts with it. Blocks of Swin and ResNet are counted through all
    stages.

    Raises:
        UsageError: timm knows no order of this model's blocks.
    """
    matcher = model.group_matcher() if hasattr(model, "group_matcher") else {}
    names = [name for name, _ in model.named_parameters()]
    levels = group_with_matcher(((name, None) for name in (*names, _BEYOND)), matcher, reverse=True)
    top = levels[_BEYOND] - 1
    if top < 1:
        raise UsageError(
            f"{type(model).__name__}: timm does not say which blocks it has. Train with training.stages.N.trainable "
            "head or all, and layer_rates flat, or choose another model.name."
        )
    return {name: min(levels[name], top) for name in names}


def rest_where_frozen(model: nn.Module) -> None:
    """Put into evaluation mode what has nothing to learn: frozen modules, and dropout before the first that learns."""
    awake = False
    for module in model.modules():  # in the order of the forward pass
        awake |= any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        learns = [parameter.requires_grad for parameter in module.parameters()]
        if not any(learns) and (learns or not awake):
            module.eval()
