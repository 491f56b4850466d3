"""Any timm model as a slice encoder: one feature vector per slice, at any input size, all or part of it trainable."""

from __future__ import annotations

import difflib
import logging
from typing import Any, Literal, Self

import timm
import torch
from timm.layers import set_reentrant_ckpt, to_2tuple
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.models.compression import NONE, Compression, compressed_features
from medvit.models.depth import block_levels, rest_where_frozen
from medvit.models.weights import WeightReport, load_weights
from medvit.records import UsageError

_log = logging.getLogger(__name__)

FALLBACK_MEAN_STD = (0.5, 0.5)
"""For models whose weights name no normalisation."""


class Backbone(nn.Module):
    """A timm model that turns slices (B, C, H, W) into features (B, D).

    Args:
        model: timm model without classifier.
        config: `features` are taken of it: `cls_mean`: prefix CLS token, where there is one, and the mean patch token
            side by side; `pooled`: timm's own pooling. Models without tokens (ResNet, Swin) are always pooled.
        size: rows and columns it is built for, px.

    Attributes:
        size: rows and columns of slices at present, px.
        width: D.
        attends: whether features follow from what the model's blocks attend to, which can be watched then.
        compression: how little of a slice it sees in training mode; in evaluation mode it always sees all of it.
    """

    def __init__(self, model: Any, config: ModelConfig, size: int) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.compression: Compression = NONE
        self.prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        self.has_tokens = hasattr(model, "pos_embed") and hasattr(model, "blocks")
        self.attends = self.has_tokens
        self.features = config.features if self.has_tokens else "pooled"
        self.has_cls = getattr(model, "cls_token", None) is not None
        # a pooled head may widen (MobileNetV3), tokens never do
        pooled = getattr(model, "head_hidden_size", model.num_features)
        width = int(model.num_features if self.features == "cls_mean" else pooled)
        self.width = 2 * width if self.features == "cls_mean" and self.has_cls else width

    @property
    def patch(self) -> int:
        """Side of a patch, px; 1 where there are none."""
        return _patch(self.model)

    @property
    def has_batch_norm(self) -> bool:
        """Whether it keeps running statistics of its batches."""
        return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.model.modules())

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches, in the order of the tokens after the prefix."""
        rows, columns = self.model.patch_embed.grid_size
        return int(rows), int(columns)

    def tokens(self, slices: Tensor) -> Tensor:
        """Final features as timm gives them: (B, N, D) for a ViT, prefix tokens first."""
        if self.training and not self.compression.none:
            return compressed_features(self.model, slices, self.compression)
        if not self.has_tokens:  # convolutions are faster so: ResNet-50 by 7 % in training, 13 % in inference (CPU)
            slices = slices.contiguous(memory_format=torch.channels_last)
        tokens: Tensor = self.model.forward_features(slices)
        return tokens

    def forward(self, slices: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D)."""
        tokens = self.tokens(slices)
        if self.features == "pooled":
            pooled: Tensor = self.model.forward_head(tokens, pre_logits=True)
            return pooled
        mean = tokens[:, self.prefix_tokens :].mean(dim=1)
        return torch.cat([tokens[:, 0], mean], dim=1) if self.has_cls else mean

    @property
    def trunk_shape(self) -> tuple[int, ...]:
        """Of what `trunk` gives for a slice."""
        return (self.width,)

    def trunk(self, slices: Tensor) -> Tensor:
        """The part that is the same before and after training where the backbone is frozen, worth a cache."""
        features: Tensor = self(slices)
        return features

    def finish(self, states: Tensor) -> Tensor:
        """What `trunk` gave -> (B, D)."""
        return states

    def set_trainable(self, trainable: Literal["head", "top", "all"], blocks: int) -> None:
        """Freeze nothing (`all`), everything (`head`), or all but the last `blocks` blocks and what follows (`top`).

        What is frozen gets no gradient, keeps no activations, and from the next call of `train` is in evaluation mode
        (dropout, drop-path, statistics of BatchNorm). Of a model with fewer blocks all are trained, not its embeddings.

        Raises:
            UsageError: `top` of a model whose blocks timm does not tell apart.
        """
        self.requires_grad_(trainable == "all")
        if trainable == "top":
            levels = block_levels(self.model)
            lowest = max(1, max(levels.values()) - blocks + 1)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(levels[name] >= lowest)
        if self.features == "cls_mean":  # which leaves timm's pooling out: nothing there would ever get a gradient
            for unused in ("attn_pool", "fc_norm"):
                if module := getattr(self.model, unused, None):
                    module.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As nn.Module.train; what is frozen stays in evaluation mode."""
        super().train(mode)
        if mode:
            rest_where_frozen(self)
        return self

    def nearest(self, px: int) -> int:
        """The multiple of the patch that is nearest to so many px, the larger of two, at least one patch."""
        return self.patch * max(1, (2 * px + self.patch) // (2 * self.patch))

    def set_size(self, px: int) -> int:
        """Take slices of another size from now on.

        A position embedding is resampled (bicubic, prefix tokens untouched); Swin's windows and relative positions
        scale along. This replaces parameters: build the optimizer afterwards.

        Returns:
            The size taken, px: the nearest that fits.

        Raises:
            UsageError: the model is built for one size.
        """
        size = self.nearest(px)
        if hasattr(self.model, "set_input_size"):
            self.model.set_input_size(img_size=(size, size))
        elif size != self.size and self.model.pretrained_cfg.get("fixed_input_size"):
            raise UsageError(
                f"training.stages: {type(self.model).__name__} is built for one input size and cannot go from "
                f"{self.size} to {size} px. Leave out size in all stages, or choose another model.name."
            )
        self.size = size
        return size

    def set_gradient_checkpointing(self, on: bool) -> None:
        """Keep only the input of each block for the backward pass, and compute the block a second time there.

        Raises:
            UsageError: timm has none for this model, or BatchNorm would count each batch twice.
        """
        if on and self.has_batch_norm:
            raise UsageError(
                f"training.gradient_checkpointing: {type(self.model).__name__} has BatchNorm, whose running statistics "
                "would count each batch twice. Turn it off, or use a ViT."
            )
        # timm's default, but for an environment variable: reentrant, a block above frozen ones would learn nothing
        set_reentrant_ckpt(False)
        try:
            self.model.set_grad_checkpointing(on)
        except (AssertionError, AttributeError):
            if on:
                raise UsageError(
                    f"training.gradient_checkpointing: timm has none for {type(self.model).__name__}. Turn it off."
                ) from None

    def fused_attention(self) -> bool:
        """Whether every attention module calls torch's fused kernel, in training as in evaluation; true without any."""
        return all(
            getattr(module, "fused_attn", False)
            for module in self.model.modules()
            if hasattr(module, "fused_attn") or "Attention" in type(module).__name__
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm exempts from weight decay."""
        return set(self.model.no_weight_decay()) if hasattr(self.model, "no_weight_decay") else set()


def build_backbone(
    config: ModelConfig, *, size: int, channels: int, kind: type[Backbone] = Backbone
) -> tuple[Backbone, WeightReport]:
    """Create the model at the given input size and load its weights.

    Args:
        config: which model and weights.
        size: rows and columns of a slice, px.
        channels: HU windows.
        kind: what is made of the model.

    Raises:
        UsageError: unknown model, a size that is no multiple of the patch, or weights that are missing, damaged,
            unreachable, or made for another architecture.
    """
    model = create_model(config, size, channels)
    _check_size(model, size)
    report = load_weights(model, config, channels)
    backbone = kind(model, config, size)
    if not backbone.fused_attention():
        _log.warning("%s: its attention is not torch's fused one; it takes more time and memory", config.name)
    return backbone, report


def normalisation(backbone: Backbone, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel that the backbone's weights were trained with, for inputs in 0..1."""
    pretrained = getattr(backbone.model, "pretrained_cfg", None) or {}
    mean, std = pretrained.get("mean"), pretrained.get("std")
    if not mean or not std:
        return (FALLBACK_MEAN_STD[0],) * channels, (FALLBACK_MEAN_STD[1],) * channels
    if len(mean) != channels:  # another number of windows than colours: the colours' average for each
        return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return tuple(mean), tuple(std)


def create_model(config: ModelConfig, size: int, channels: int, classes: int = 0) -> Any:
    """The timm model with random weights; `classes` of its classifier, 0 for none.

    Raises:
        UsageError: timm cannot build it.
    """
    options: dict[str, Any] = dict(config.options)
    try:
        if size_is_fixed(config.name):
            options["img_size"] = size
        return timm.create_model(
            config.name,
            pretrained=False,
            num_classes=classes,
            in_chans=channels,
            drop_path_rate=config.drop_path,
            **options,
        )
    except (RuntimeError, TypeError, AssertionError, ValueError) as error:
        near = ", ".join(difflib.get_close_matches(config.name.split(".")[0], timm.list_models()))
        hint = f" Similar names: {near}." if near and "Unknown model" in str(error) else ""
        raise UsageError(f"model.name {config.name!r}: timm cannot build it ({error}).{hint}") from None


def size_is_fixed(name: str) -> bool:
    """Whether the model is built for one input size (ViT, Swin) rather than for any (ResNet)."""
    pretrained = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return bool(pretrained and pretrained.fixed_input_size)


def _check_size(model: Any, size: int) -> None:
    patch = _patch(model)
    if size % patch:
        below = size - size % patch
        raise UsageError(
            f"preprocessing.size {size} is no multiple of the model's patch of {patch} px: use {below or patch} "
            f"or {below + patch}."
        )


def _patch(model: Any) -> int:
    """Side of the patches that slices must consist of, px; 1 for convolutions, which take any size."""
    if not hasattr(model, "set_input_size") and not model.pretrained_cfg.get("fixed_input_size"):
        return 1
    return int(to_2tuple(getattr(getattr(model, "patch_embed", None), "patch_size", 1))[0])
