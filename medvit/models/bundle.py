"""A trained model as a folder: weights and reference as safetensors, `bundle.json`. No pickle, versioned, hashed.

The JSON holds everything that decides a prediction beside the weights: architecture, preprocessing, class order,
operating point. A bundle that was changed in transit does not load.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from medvit.models.bundle_info import (
    MANIFEST_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    BundleInfo,
    ReferenceInfo,
    file_sha256,
    find_bundle,
    info_sha256,
    read_info,
)
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.models.reference import Reference
from medvit.records import UsageError

REFERENCE_ARRAYS = ("mean", "precision", "known", "sample")


def save_bundle(
    folder: Path, classifier: CtClassifier, info: BundleInfo, reference: Reference | None = None
) -> BundleInfo:
    """Write weights and reference, then the JSON that makes them a bundle; returns the info with all hashes."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    complete = info.model_copy(update={"weights_sha256": _save(weights, folder / WEIGHTS_FILE), "ood": None})
    if reference is not None:
        arrays = {name: torch.from_numpy(getattr(reference, name)) for name in REFERENCE_ARRAYS}
        ood = ReferenceInfo(
            kind=reference.kind,
            threshold=reference.threshold if math.isfinite(reference.threshold) else None,
            sha256=_save(arrays, folder / REFERENCE_FILE),
        )
        complete = complete.model_copy(update={"ood": ood})
    complete = complete.model_copy(update={"info_sha256": info_sha256(complete.model_dump_json())})
    part = folder / f"{MANIFEST_FILE}.part"
    part.write_text(complete.model_dump_json(indent=2), encoding="utf-8")
    part.replace(folder / MANIFEST_FILE)
    return complete


def open_bundle(path: Path) -> tuple[CtClassifier, BundleInfo]:
    """Load a bundle, verifying schema, hash and every tensor.

    Raises:
        UsageError: missing, damaged, changed, or written by a newer medvit.
    """
    info, weights = read_info(path)
    plain = info.architecture.model_copy(update={"weights": "none"})
    classifier, _ = build_classifier(
        plain, size=info.preprocessing.size, channels=len(info.preprocessing.windows), classes=max(1, len(info.classes))
    )
    classifier.load_state_dict(load_file(weights))
    classifier.eval()
    return classifier, info


def open_reference(path: Path, info: BundleInfo) -> Reference | None:
    """What the model of a bundle knows; None where the bundle does not say.

    Raises:
        UsageError: missing or damaged.
    """
    if info.ood is None:
        return None
    file = find_bundle(path) / REFERENCE_FILE
    if not file.is_file() or file_sha256(file) != info.ood.sha256:
        raise UsageError(f"{file}: missing, or not the file that {MANIFEST_FILE} describes. Copy the bundle again.")
    arrays = {name: tensor.numpy() for name, tensor in load_file(file).items()}
    threshold = math.inf if info.ood.threshold is None else info.ood.threshold
    return Reference(kind=info.ood.kind, threshold=threshold, **arrays)


def _save(tensors: dict[str, torch.Tensor], path: Path) -> str:
    """Write all or nothing; returns the hash."""
    part = path.with_name(f"{path.name}.part")
    save_file(tensors, part)
    part.replace(path)
    return file_sha256(path)
