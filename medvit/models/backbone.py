"""Any timm model as a slice encoder: weights, input size, one feature vector per slice.

Weights are never silently random. A file must fit the architecture key by key: timm itself drops unexpected keys with a
log line (DINOv2 weights "load" into a plain ViT without their LayerScale), here that is an error.
"""

from __future__ import annotations

import difflib
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_pretrained
from torch import Tensor, nn

from medvit.config import ModelConfig
from medvit.records import UsageError

FALLBACK_MEAN_STD = (0.5, 0.5)
"""For models whose weights name no normalisation."""


@dataclass(frozen=True)
class WeightReport:
    """What was loaded: `source` is none, hub or a file name; `keys` how many tensors; `sha256` of the file, if one."""

    source: str
    keys: int = 0
    sha256: str = ""


class Backbone(nn.Module):
    """A timm model that turns slices (B, C, H, W) into features (B, D).

    Args:
        model: timm model without classifier.
        features: `cls_mean`: prefix CLS token, where there is one, and the mean patch token side by side; `pooled`:
            timm's own pooling. Models without tokens (ResNet, Swin) are always pooled.
    """

    def __init__(self, model: Any, features: Literal["cls_mean", "pooled"]) -> None:
        super().__init__()
        self.model = model
        self.prefix_tokens = int(getattr(self.model, "num_prefix_tokens", 0))
        has_tokens = hasattr(model, "pos_embed") and hasattr(model, "blocks")
        self.features = features if has_tokens else "pooled"
        self.has_cls = getattr(model, "cls_token", None) is not None
        # a pooled head may widen (MobileNetV3), tokens never do
        pooled = getattr(model, "head_hidden_size", model.num_features)
        width = int(model.num_features if self.features == "cls_mean" else pooled)
        self.width = 2 * width if self.features == "cls_mean" and self.has_cls else width

    def tokens(self, slices: Tensor) -> Tensor:
        """Final features as timm gives them: (B, N, D) for a ViT, prefix tokens first."""
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

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm exempts from weight decay."""
        return set(self.model.no_weight_decay()) if hasattr(self.model, "no_weight_decay") else set()


def build_backbone(config: ModelConfig, *, size: int, channels: int) -> tuple[Backbone, WeightReport]:
    """Create the model at the given input size and load its weights.

    Args:
        config: which model and weights.
        size: rows and columns of a slice, px.
        channels: HU windows.

    Raises:
        UsageError: unknown model, a size that is no multiple of the patch, or weights that are missing, damaged,
            unreachable, or made for another architecture.
    """
    model = _create(config, size, channels)
    _check_size(model, size)
    report = _load(model, config, channels)
    return Backbone(model, config.features), report


def normalisation(backbone: Backbone, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel that the backbone's weights were trained with, for inputs in 0..1."""
    pretrained = getattr(backbone.model, "pretrained_cfg", None) or {}
    mean, std = pretrained.get("mean"), pretrained.get("std")
    if not mean or not std:
        return (FALLBACK_MEAN_STD[0],) * channels, (FALLBACK_MEAN_STD[1],) * channels
    if len(mean) != channels:  # another number of windows than colours: the colours' average for each
        return (sum(mean) / len(mean),) * channels, (sum(std) / len(std),) * channels
    return tuple(mean), tuple(std)


def _create(config: ModelConfig, size: int, channels: int) -> Any:
    options: dict[str, Any] = dict(config.options)
    try:
        if size_is_fixed(config.name):
            options["img_size"] = size
        return timm.create_model(
            config.name,
            pretrained=False,
            num_classes=0,
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
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and size % patch[0]:
        below = size - size % patch[0]
        raise UsageError(
            f"preprocessing.size {size} is no multiple of the model's patch of {patch[0]} px: use {below or patch[0]} "
            f"or {below + patch[0]}."
        )


def _load(model: Any, config: ModelConfig, channels: int) -> WeightReport:
    if config.weights == "none":
        return WeightReport("none")
    source = dict(model.pretrained_cfg)
    if config.weights == "hub":
        report_source, digest = "hub", ""
    else:
        path = Path(config.weights)
        digest = _check_file(path)
        # custom_load is for the original npz files of some models
        source |= {"file": str(path), "custom_load": False}
        report_source = path.name
    seen: list[Any] = []
    hook = model.register_load_state_dict_post_hook(
        lambda _, keys: seen.append((keys.missing_keys[:], keys.unexpected_keys[:]))
    )
    try:
        _load_source(model, source, config, channels)
    finally:
        hook.remove()
    missing, unexpected = seen[-1]
    if missing or unexpected:
        raise UsageError(
            f"model.weights {config.weights!r} does not fit {config.name}: {len(missing)} tensors are missing "
            f"({', '.join(missing[:3])}...), {len(unexpected)} are unexpected ({', '.join(unexpected[:3])}...). "
            "Give the architecture that these weights were made for as model.name."
        )
    return WeightReport(report_source, len(model.state_dict()), digest)


def _load_source(model: Any, source: dict[str, Any], config: ModelConfig, channels: int) -> None:
    # the same renaming and resampling that timm's own create_model(pretrained=True) applies
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        load_pretrained(model, source, num_classes=0, in_chans=channels, filter_fn=adapt)
    except OSError as error:
        raise UsageError(
            f"model.weights {config.weights!r}: the hub is not reachable and has left no copy here "
            f"({type(error).__name__}). Download the model's .safetensors file elsewhere and give its path as "
            "model.weights, or set model.weights=none to start from random weights."
        ) from None
    except (RuntimeError, KeyError, ValueError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise UsageError(
            f"model.weights {config.weights!r} does not fit {config.name}: {reason}. Give the architecture that these "
            "weights were made for as model.name."
        ) from None


def _check_file(path: Path) -> str:
    """sha256 of a whole safetensors file.

    Raises:
        UsageError: missing, another format, or damaged.
    """
    if not path.is_file():
        raise UsageError(f"model.weights {str(path)!r}: no such file. Give a .safetensors file, hub, or none.")
    if path.suffix != ".safetensors":
        raise UsageError(
            f"model.weights {str(path)!r}: saw {path.suffix or 'no suffix'}; only .safetensors is read: pickled "
            "weights can run code. Convert it with safetensors.torch.save_file."
        )
    try:
        with safe_open(path, "pt") as file:
            file.keys()
    except SafetensorError as error:
        raise UsageError(
            f"model.weights {str(path)!r}: damaged or cut short ({error}). Copy the file again and compare its size."
        ) from None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
