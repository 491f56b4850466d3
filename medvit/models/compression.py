"""Fewer tokens for a slice while a ViT learns: some of the patch tokens are dropped, or patches are larger.

Attention and MLPs cost what tokens they are given, and early in training a rough gradient of many cheap steps is worth
more than an exact one of few (Lin et al. 2024, arXiv 2410.22364). Both ways leave the stored weights as they are: a
larger patch is embedded by a kernel that is resized anew for each call, always from the stored one, since resizes that
are chained lose a little each time.

A patch must divide the slice. Padding would make tokens that show nothing and move the position embedding against the
picture, resizing would change how many mm a pixel is; and every size has divisors.

Only timm's VisionTransformer is known here (ViT, DeiT, DINOv2): convolutions have no tokens to drop, Swin's windows
need them all, and rotary models (EVA, DINOv3) would need the positions of those that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from timm.layers import PatchEmbed, resample_abs_pos_embed, resample_patch_embed
from timm.models import checkpoint_seq
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from medvit.records import UsageError


@dataclass(frozen=True)
class Compression:
    """How little of a slice a backbone sees.

    Attributes:
        keep: share of the patch tokens that are kept, above 0, at most 1.
        patch: side of a patch, px; None: the model's own.
    """

    keep: float = 1.0
    patch: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep is a share above 0, at most 1, got {self.keep}")
        if self.patch is not None and self.patch < 1:
            raise ValueError(f"patch is a side in px, at least 1, got {self.patch}")

    @property
    def none(self) -> bool:
        """Whether nothing is left out; read field by field, so that torch.compile sees each of them change."""
        return self.keep == 1 and self.patch is None

    def share(self, own: int) -> float:
        """Of the patch tokens that a model whose own patch is `own` px would have."""
        return self.keep * (own / (self.patch or own)) ** 2


NONE = Compression()
"""All tokens, patches of the model's own size."""


class Compressible(Protocol):
    """A backbone, as far as compression knows it."""

    compression: Compression
    training: bool


@contextmanager
def compressed(backbone: Compressible, compression: Compression, *, resting: bool = False) -> Iterator[None]:
    """Within, the backbone embeds slices so while it is in training mode; afterwards as before, whatever happened.

    Args:
        backbone: a `Backbone`.
        compression: of its slices.
        resting: in evaluation mode too, in which a teacher is kept; dropout within it goes on resting.
    """
    before = backbone.compression, backbone.training
    backbone.compression, backbone.training = compression, backbone.training or resting
    try:
        yield
    finally:
        backbone.compression, backbone.training = before


def check_compression(model: Any, compression: Compression, size: int) -> None:
    """Refuse what `compressed_features` cannot do with slices of `size` px.

    Raises:
        UsageError: the model has no tokens that could be left out, or the patch is smaller than the model's own or does
            not divide the slice.
    """
    if compression == NONE:
        return
    name = type(model).__name__
    if not isinstance(model, VisionTransformer) or not isinstance(model.patch_embed, PatchEmbed):
        raise UsageError(
            f"objective.acceleration: {name} has no patch tokens that could be dropped or made larger. Leave it out, "
            "or choose a plain ViT, DeiT or DINOv2 as model.name."
        )
    own, patch = model.patch_embed.patch_size[0], compression.patch
    if patch is None:
        return
    if patch < own:
        raise UsageError(
            f"objective.acceleration: patches of {patch} px are smaller than the model's own of {own} px: that would "
            "be more tokens. Give a larger one, or null for its own."
        )
    if size % patch:
        fitting = [side for side in range(own, size + 1) if size % side == 0]
        raise UsageError(
            f"objective.acceleration: patches of {patch} px do not divide slices of {size} px. Patches of "
            f"{', '.join(map(str, fitting))} px do."
        )


def compressed_features(model: Any, slices: Tensor, compression: Compression) -> Tensor:
    """What timm's `forward_features` makes of fewer tokens: (B, C, H, W) -> (B, N, D), prefix tokens first.

    Which tokens are kept is drawn from torch's global generator, for each slice and each call anew: two views of a
    slice lose different ones.

    Raises:
        UsageError: as `check_compression`.
    """
    for size in dict.fromkeys(slices.shape[-2:]):
        check_compression(model, compression, size)
    tokens = model.patch_drop(embed(model, slices, compression.patch))
    tokens = model.norm_pre(drop_tokens(tokens, compression.keep, model.num_prefix_tokens))
    blocks = model.blocks
    features: Tensor = model.norm(checkpoint_seq(blocks, tokens) if model.grad_checkpointing else blocks(tokens))
    return features


def embed(model: Any, slices: Tensor, patch: int | None) -> Tensor:
    """Slices (B, C, H, W) as tokens with their positions (B, N, D), prefix tokens first, from patches of any size.

    The position embedding is resampled for the new grid (bicubic, prefix tokens untouched).
    """
    own = model.patch_embed
    if patch is None or patch == own.patch_size[0]:
        tokens: Tensor = model._pos_embed(own(slices))
        return tokens
    kernel = resize_kernel(own.proj.weight, patch)
    grid = nn.functional.conv2d(slices, kernel, own.proj.bias, stride=patch)  # (B, D, rows, columns)
    return _with_positions(model, own.norm(grid.flatten(2).transpose(1, 2)), list(grid.shape[-2:]))


def _with_positions(model: Any, patches: Tensor, grid: list[int]) -> Tensor:
    """Patch tokens (B, rows * columns, D) of any grid -> (B, N, D), as timm's `_pos_embed` does for the model's own."""
    prefix = [
        token.expand(len(patches), -1, -1)
        for name in ("cls_token", "dist_token", "reg_token")  # in timm's order
        if (token := getattr(model, name, None)) is not None
    ]
    tokens = torch.cat([*prefix, patches], dim=1)
    if model.pos_embed is None:
        return tokens
    # some position embeddings have places for the prefix (ViT, DeiT), others for patches alone (models with registers)
    placed = 0 if model.no_embed_class else model.num_prefix_tokens
    positions = resample_abs_pos_embed(model.pos_embed, grid, list(model.patch_embed.grid_size), placed)
    bare = tokens.shape[1] - positions.shape[1]
    result: Tensor = model.pos_drop(torch.cat([tokens[:, :bare], tokens[:, bare:] + positions], dim=1))
    return result


def resize_kernel(kernel: Tensor, patch: int) -> Tensor:
    """Kernel (D, C, P, P) for patches of another side: w_new = pinv(B^T) w_old, B the matrix of a bilinear resize.

    What the new kernel says of an enlarged patch is what the old one said of the patch: <Bx, w_new> = <x, w_old>
    (FlexiViT, Beyer et al. 2023, arXiv 2212.08013). Gradients reach the given kernel.
    """
    with torch.autocast(kernel.device.type, enabled=False):
        inverse: Tensor = _inverse_resize(kernel.shape[-1], patch).to(kernel)
        return (kernel.flatten(2) @ inverse).view(*kernel.shape[:2], patch, patch)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # traced, it would run in every step
def _inverse_resize(own: int, patch: int) -> Tensor:
    """(own², patch²): what each place of the stored kernel becomes."""
    return _computed_once(own, patch)


@lru_cache
def _computed_once(own: int, patch: int) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():  # else a first call without gradients would spoil later ones
        basis = torch.eye(own * own).view(own * own, 1, own, own)
        resized: Tensor = resample_patch_embed(basis, [patch, patch], interpolation="bilinear")
        return resized.flatten(1)


def drop_tokens(tokens: Tensor, keep: float, prefix: int) -> Tensor:
    """Keep all prefix tokens and a share of the others, any subset alike: (B, N, D) -> (B, prefix + kept, D).

    PatchDropout (Liu et al. 2023, arXiv 2208.07220). After the position embedding: what is left knows its place.
    """
    B, N, _ = tokens.shape
    kept = kept_tokens(keep, N - prefix)
    if kept == N - prefix:
        return tokens
    chosen = torch.rand(B, N - prefix, device=tokens.device).argsort(dim=1)[:, :kept]
    return take_patches(tokens, chosen, prefix)


def take_patches(tokens: Tensor, chosen: Tensor, prefix: int) -> Tensor:
    """All prefix tokens and the chosen patches (B, K), in that order: (B, N, D) -> (B, prefix + K, D)."""
    patches = tokens[:, prefix:].gather(1, chosen[:, :, None].expand(-1, -1, tokens.shape[-1]))
    return torch.cat([tokens[:, :prefix], patches], dim=1)


def kept_tokens(keep: float, tokens: int) -> int:
    """How many of so many tokens are kept: the share, rounded down, at least one."""
    return max(1, int(keep * tokens + 1e-9))  # 0.29 of 100 is 29, and 28.999999999999996 in floating point
