"""What a bundle says about its model: `bundle.json`, read and verified without building the model.

Versioned and hashed: what was changed in transit is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from medvit.config import ModelConfig, TtaConfig
from medvit.records import Preprocessing, UsageError

SCHEMA_VERSION = 1
WEIGHTS_FILE, REFERENCE_FILE, MANIFEST_FILE = "model.safetensors", "reference.safetensors", "bundle.json"


class TrainingRange(BaseModel):
    """What the model was trained on; input outside is not for this model. Empty where the headers said nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    body_parts: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    manufacturers: tuple[str, ...] = ()
    contrast: tuple[str, ...] = ()
    slice_thickness_mm: tuple[float, float] | None = None

    def outside(self, acquisition: Mapping[str, str]) -> tuple[str, ...]:
        """In what a scan is unlike all training scans: names such as "kernel". What nobody told is unlike nothing.

        Contrast is an exception: headers do not say "none", so that scans with agent are unlike a training set in which
        none was known to have any. Thickness may leave the range by a tenth.
        """
        found = []
        named = {"body_part": self.body_parts, "kernel": self.kernels, "manufacturer": self.manufacturers}
        for name, known in named.items():
            given = _plain(acquisition.get(name, ""))
            if given and known and given not in {_plain(one) for one in known}:
                found.append(name)
        if acquisition.get("contrast") and not self.contrast:
            found.append("contrast")
        thickness = acquisition.get("slice_thickness_mm")
        if thickness and self.slice_thickness_mm is not None:
            low, high = self.slice_thickness_mm
            if not 0.9 * low <= float(thickness) <= 1.1 * high:
                found.append("slice_thickness_mm")
        return tuple(found)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


class ReferenceInfo(BaseModel):
    """What tells cases apart that the model does not know; its arrays are in reference.safetensors.

    `threshold` None: there were too few reference cases to set one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["mahalanobis", "knn"]
    threshold: float | None
    sha256: str = ""


class BundleInfo(BaseModel):
    """Contents of bundle.json.

    `mean` and `std` are per channel as applied; a model that was pretrained without labels has no `classes`;
    `threshold` is on the last of two; a scan outside `training_range` in one of `refuse` gets no score; `provenance` is
    free text about the run, without identity; `weights_sha256` is of model.safetensors, `info_sha256` of everything
    else here.
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
    ood: ReferenceInfo | None = None
    training_range: TrainingRange = TrainingRange()
    refuse: tuple[str, ...] = ()
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


def read_info(path: Path) -> tuple[BundleInfo, Path]:
    """What a run or bundle says, and the file of its weights; schema and both hashes are verified.

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
    if info_sha256(text) != info.info_sha256:
        raise UsageError(f"{folder / MANIFEST_FILE}: changed since it was written. Copy the bundle again.")
    weights = folder / WEIGHTS_FILE
    if not weights.is_file() or file_sha256(weights) != info.weights_sha256:
        raise UsageError(f"{weights}: missing, or not the file that {MANIFEST_FILE} describes. Copy the bundle again.")
    return info, weights


def info_sha256(text: str) -> str:
    """Hash of the fields as written, whatever their order and spacing, without the hash itself."""
    fields = json.loads(text)
    fields.pop("info_sha256", None)
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
