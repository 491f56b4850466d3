"""Weights of a timm model, from the hub, a file or a run of medvit-train: all of them, or an error.

Weights are never silently random. A file must fit the architecture key by key: timm itself drops unexpected keys with a
log line (DINOv2 weights "load" into a plain ViT without their LayerScale), here that is an error.

Weights of a run know what they were shown: other windows or another normalisation would be another modality to them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from timm.models import load_pretrained
from torch import Tensor

from medvit.config import ModelConfig
from medvit.models.bundle_info import BundleInfo, file_sha256, read_info
from medvit.records import Preprocessing, UsageError, Window, resolve_window

IN_BUNDLE = "backbone.model."
"""How names of the timm model's tensors begin in a bundle."""


@dataclass(frozen=True)
class WeightReport:
    """What was loaded.

    Attributes:
        source: none, hub, or the name of a file or run.
        keys: how many tensors.
        sha256: of the file, if one.
        run: what the run says that they come from, if one.
    """

    source: str
    keys: int = 0
    sha256: str = ""
    run: BundleInfo | None = None


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
    run: BundleInfo | None = None
    if config.weights == "hub":
        report_source, digest = "hub", ""
    elif (path := Path(config.weights)).is_dir():
        run, source["state_dict"] = _backbone_of_run(path)
        # whoever asks the model for its normalisation gets that of the run
        model.pretrained_cfg = {**model.pretrained_cfg, "mean": run.mean, "std": run.std}
        report_source, digest = _name(path), run.weights_sha256
    else:
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
    return WeightReport(report_source, len(model.state_dict()), digest, run)


def check_input(
    report: WeightReport, preprocessing: Preprocessing, mean: Sequence[float], std: Sequence[float]
) -> None:
    """Refuse to show the weights of a run other slices than it has seen. Their size may differ.

    Args:
        report: of the weights; those of no run take anything.
        preprocessing: windows, CLAHE and orientation.
        mean: per channel, as will be applied.
        std: likewise.

    Raises:
        UsageError: what differs, and what it was in the run.
    """
    if report.run is None:
        return
    theirs = report.run.preprocessing
    wanted = {
        "preprocessing.windows": (_windows(theirs), _windows(preprocessing)),
        "preprocessing.clahe": (theirs.clahe, preprocessing.clahe),
        "preprocessing.orientation": (theirs.orientation, preprocessing.orientation),
        "preprocessing.mean": (report.run.mean, tuple(mean)),
        "preprocessing.std": (report.run.std, tuple(std)),
    }
    if other := {name: pair for name, pair in wanted.items() if pair[0] != pair[1]}:
        told = "; ".join(f"{name} was {was}, here it is {now}" for name, (was, now) in other.items())
        raise UsageError(
            f"model.weights: the run {report.source!r} has seen other slices: {told}. Train with what it was trained "
            "with; mean and std are its own where preprocessing.mean and data.normalise say nothing else."
        )


def source_classes(config: ModelConfig) -> int:
    """How many classes the classifier tells apart that the weights bring; 0 without one."""
    known = timm.get_pretrained_cfg(config.name, allow_unregistered=True)
    if config.weights == "none" or Path(config.weights).is_dir() or known is None:
        return 0  # a run has another head
    if not isinstance(known.classifier, str):
        return 0
    if config.weights == "hub":
        return int(known.num_classes)
    weight = f"{known.classifier}.weight"
    with safe_open(config.weights, "pt") as file:
        return int(file.get_slice(weight).get_shape()[0]) if weight in set(file.keys()) else 0


def _backbone_of_run(path: Path) -> tuple[BundleInfo, dict[str, Tensor]]:
    """What the run says, and the tensors of its backbone by timm's names.

    Raises:
        UsageError: as `read_info`, or what the run has learned is not in the weights of its model.
    """
    info, file = read_info(path)
    if info.architecture.tuning in ("lora", "synqt"):
        raise UsageError(
            f"model.weights {str(path)!r}: tuned by {info.architecture.tuning}, which leaves the weights of its model "
            "as they were, and what it learned beside them is not taken apart from its run. Give that model's own "
            "weights, which it started from."
        )
    tensors = load_file(file)
    return info, {name.removeprefix(IN_BUNDLE): tensors[name] for name in tensors if name.startswith(IN_BUNDLE)}


def _name(path: Path) -> str:
    whole = path.resolve()
    return whole.parent.name if whole.name == "bundle" else whole.name


def _windows(preprocessing: Preprocessing) -> tuple[Window, ...]:
    return tuple(resolve_window(window) for window in preprocessing.windows)


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
        raise UsageError(f"model.weights {str(path)!r}: no such file. Give a .safetensors file, a run, hub, or none.")
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
    return file_sha256(path)
