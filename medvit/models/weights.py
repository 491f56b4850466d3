"""Weights of a timm model, from the hub or a file: all of them, or an error.

Weights are never silently random. A file must fit the architecture key by key: timm itself drops unexpected keys with a
log line (DINOv2 weights "load" into a plain ViT without their LayerScale), here that is an error.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models import load_pretrained

from medvit.config import ModelConfig
from medvit.records import UsageError


@dataclass(frozen=True)
class WeightReport:
    """What was loaded: `source` is none, hub or a file name; `keys` how many tensors; `sha256` of the file, if one."""

    source: str
    keys: int = 0
    sha256: str = ""


def load_weights(model: Any, config: ModelConfig, channels: int, classes: int = 0) -> WeightReport:
    """Load what `config.weights` names into a timm model.

    Args:
        model: a timm model, changed in place.
        config: which weights.
        channels: HU windows; the first layer's weights are adapted to them as timm does.
        classes: of the model's classifier, which is loaded too; 0 for a model without one.

    Raises:
        UsageError: weights that are missing, damaged, unreachable, or made for another architecture.
    """
    if config.weights == "none":
        return WeightReport("none")
    source = dict(model.pretrained_cfg)
    if classes:  # those of a file may be others than those that timm knows; another number, and timm drops all of them
        source |= {"num_classes": classes, "label_offset": 0}
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
        _load_source(model, source, config, channels, classes)
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


def source_classes(config: ModelConfig) -> int:
    """How many classes the classifier tells apart that the weights bring; 0 without one."""
    known = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if config.weights == "none" or known is None or not isinstance(known.classifier, str):
        return 0
    if config.weights == "hub":
        return int(known.num_classes)
    weight = f"{known.classifier}.weight"
    with safe_open(config.weights, "pt") as file:
        return int(file.get_slice(weight).get_shape()[0]) if weight in set(file.keys()) else 0


def _load_source(model: Any, source: dict[str, Any], config: ModelConfig, channels: int, classes: int) -> None:
    # the same renaming and resampling that timm's own create_model(pretrained=True) applies
    adapt = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        load_pretrained(model, source, num_classes=classes, in_chans=channels, filter_fn=adapt)
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
