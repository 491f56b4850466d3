"""A ViT shown less than a whole picture: small crops beside large ones, and some patches of many.

Both leave the model as it was, parameters included: what is different lasts as long as the `with` block.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.layers import Format
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medvit.models.backbone import Backbone
from medvit.models.compression import take_patches
from medvit.records import UsageError


@contextmanager
def any_size(backbone: Backbone) -> Iterator[None]:
    """Within, slices may have any size that is a multiple of the patch: position embeddings are resampled on the way.

    Unlike `Backbone.set_size` this replaces no parameter, so that sizes can alternate within one step.

    Raises:
        UsageError: no plain ViT.
    """
    model = plain_vit(backbone)
    embed = model.patch_embed
    before = model.dynamic_img_size, embed.strict_img_size, embed.flatten, embed.output_fmt
    model.dynamic_img_size, embed.strict_img_size, embed.flatten, embed.output_fmt = True, False, False, Format.NHWC
    try:
        yield
    finally:
        model.dynamic_img_size, embed.strict_img_size, embed.flatten, embed.output_fmt = before


def encode_patches(backbone: Backbone, slices: Tensor, kept: Tensor) -> Tensor:
    """Encode some patches of each slice: they have their positions, and see each other and the prefix tokens only.

    Args:
        backbone: a plain ViT.
        slices: (B, C, H, W).
        kept: (B, K) which patches, numbered along rows.

    Returns:
        final tokens (B, P + K, D): P prefix tokens, then the patches in the order of `kept`.

    Raises:
        UsageError: no plain ViT.
    """
    model, prefix = plain_vit(backbone), backbone.prefix_tokens

    def choose(_module: nn.Module, _given: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
        return take_patches(tokens, kept, prefix)

    # where timm drops patches itself: behind the position embedding, before the first block
    hook = model.patch_drop.register_forward_hook(choose)
    try:
        tokens: Tensor = model.forward_features(slices)
    finally:
        hook.remove()
    return tokens


def plain_vit(backbone: Backbone) -> Any:
    """Its timm model.

    Raises:
        UsageError: no plain ViT.
    """
    if not isinstance(backbone.model, VisionTransformer):
        raise UsageError(
            f"model.name: {type(backbone.model).__name__} cannot be shown parts of a picture, which objective.name mae "
            "and small crops need. Use a plain ViT (vit_*, deit3_*)."
        )
    return backbone.model
