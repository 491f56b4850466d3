"""What the blocks of a ViT attend to, while somebody watches: timm's attention weights, with their gradients.

timm's attention calls torch's fused kernel, which returns no weights. While watched it computes them in steps (the same
numbers up to rounding), and every block's softmax passes through its dropout, which is where we look. Whatever happens
meanwhile, afterwards the model is as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from medvit.models.backbone import Backbone
from medvit.records import UsageError


@contextmanager
def watched_attention(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Every forward pass inside appends the attention (B, heads, N, N) of each block, first block first.

    Row i says where token i looks; rows sum to 1; prefix tokens come first. In evaluation mode (dropout would be seen).

    Raises:
        UsageError: no ViT whose blocks have one such attention each: `watchable` tells beforehand.
    """
    modules = _attention_modules(backbone)
    if not modules:
        raise UsageError(
            f"{type(backbone.model).__name__}: its blocks have no attention over all tokens that can be watched. "
            "Use a ViT, or leave attention out of the report (evaluation.attention=null)."
        )
    seen: list[Tensor] = []
    with ExitStack() as undo:
        # recomputed blocks would show their attention twice, and not the one that gradients flow through
        undo.callback(backbone.model.set_grad_checkpointing, bool(backbone.model.grad_checkpointing))
        backbone.model.set_grad_checkpointing(False)
        for module in modules:
            undo.callback(setattr, module, "fused_attn", module.fused_attn)
            module.fused_attn = False
            hook = module.attn_drop.register_forward_hook(lambda _module, _given, weights: seen.append(weights))
            undo.callback(hook.remove)
        yield seen


def watchable(backbone: Backbone) -> bool:
    """Whether `watched_attention` takes it: yes for timm's ViT, DeiT, EVA; no for Swin and convolutions."""
    return bool(_attention_modules(backbone))


def _attention_modules(backbone: Backbone) -> list[Any]:
    """One per block, or none at all."""
    if not backbone.attends:
        return []
    found = [[module for module in block.modules() if _shows_weights(module)] for block in backbone.model.blocks]
    return [modules[0] for modules in found] if all(len(modules) == 1 for modules in found) else []


def _shows_weights(module: nn.Module) -> bool:
    return hasattr(module, "fused_attn") and isinstance(getattr(module, "attn_drop", None), nn.Module)
