"""A trained model as a folder: `model.safetensors` and `bundle.json`. No pickle, versioned, hashed.

The JSON holds everything that decides a prediction beside the weights: architecture, preprocessing, class order,
operating point. A bundle that was changed in transit does not load.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_file, save_file

from medvit.config import ModelConfig, TtaConfig
from medvit.models.classifier import CtClassifier, build_classifier
from medvit.records import Preprocessing, UsageError

SCHEMA_VERSION = 1
WEIGHTS_FILE, MANIFEST_FILE = "model.safetensors", "bundle.json"


class TrainingRange(BaseModel):
    """What the model was trained on; input outside is not for this model. Empty where the headers said nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_parts: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    manufacturers: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()
    slice_thickness_mm: tuple[float, float] | None = None


class BundleInfo(BaseModel):
    """Contents of bundle.json.

    `mean` and `std` are per channel as applied; `threshold` is on the last of two classes; `provenance` is free text
    about the run, without identity; `weights_sha256` is of model.safetensors, `info_sha256` of everything else here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    architecture: ModelConfig
    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: tuple[str, ...]
    threshold: float | None = None
    temperature: float = 1.0
    tta: TtaConfig | None = None
    training_range: TrainingRange = TrainingRange()
    provenance: dict[str, str] = {}
    weights_sha256: str = ""
    info_sha256: str = ""


def find_bundle(path: Path) -> Path:
    """The bundle folder of a run or bundle path.

    Raises:
        UsageError: neither.
    """
    for folder in (path, path / "bundle"):
        if (folder / MANIFEST_FILE).is_file():
            return folder
    raise UsageError(
        f"{path}: no model there ({MANIFEST_FILE} is in neither {path} nor {path / 'bundle'}). Give the output folder "
        "of medvit-train, or its bundle folder."
    )


def save_bundle(folder: Path, classifier: CtClassifier, info: BundleInfo) -> BundleInfo:
    """Write weights, then the JSON that makes them a bundle; returns the info with the hashes filled in."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    part = folder / f"{WEIGHTS_FILE}.part"
    save_file(weights, part)
    part.replace(folder / WEIGHTS_FILE)
    complete = info.model_copy(update={"weights_sha256": _sha256(folder / WEIGHTS_FILE)})
    complete = complete.model_copy(update={"info_sha256": _info_sha256(complete.model_dump_json())})
    part = folder / f"{MANIFEST_FILE}.part"
    part.write_text(complete.model_dump_json(indent=2), encoding="utf-8")
    part.replace(folder / MANIFEST_FILE)
    return complete


def open_bundle(path: Path) -> tuple[CtClassifier, BundleInfo]:
    """Load a bundle, verifying schema, hash and every tensor.

    Raises:
        UsageError: missing, damaged, changed, or written by a newer medvit.
    """
    folder = find_bundle(path)
    try:
        text = (folder / MANIFEST_FILE).read_text(encoding="utf-8")
        info = BundleInfo.model_validate_json(text)
    except (ValidationError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{folder / MANIFEST_FILE}: not a bundle of schema {SCHEMA_VERSION} ({error.__class__.__name__}). Was it "
            "edited, or written by another version of medvit?"
        ) from None
    if info.schema_version != SCHEMA_VERSION:
        raise UsageError(f"{folder}: schema {info.schema_version}, this medvit reads {SCHEMA_VERSION}. Update medvit.")
    if _info_sha256(text) != info.info_sha256:
        raise UsageError(f"{folder / MANIFEST_FILE}: changed since it was written. Copy the bundle again.")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or _sha256(weights) != info.weights_sha256:
        raise UsageError(f"{weights}: missing, or not the file that {MANIFEST_FILE} describes. Copy the bundle again.")
    plain = info.architecture.model_copy(update={"weights": "none"})
    classifier, _ = build_classifier(
        plain, size=info.preprocessing.size, channels=len(info.preprocessing.windows), classes=len(info.classes)
    )
    classifier.load_state_dict(load_file(weights))
    classifier.eval()
    return classifier, info


def _info_sha256(text: str) -> str:
    """Hash of the fields as written, whatever their order and spacing, without the hash itself."""
    fields = json.loads(text)
    fields.pop("info_sha256", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
