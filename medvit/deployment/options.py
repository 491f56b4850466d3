"""How a batch is run, what of it decides its results, and how sources are named in what it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import medvit
from medvit.data.pseudonym import pseudonym
from medvit.deployment.choice import Wanted
from medvit.inference import Model
from medvit.io import Finding, ResultContext
from medvit.records import Prediction


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How a batch is run.

    Attributes:
        wanted: which studies.
        settled_s: leave series with a file that changed within so many seconds for the next run.
        assume_hu: take values without rescale tags for HU, flagged.
        dicom: write reports and pictures.
        deidentify: nothing that is written tells who the patients are.
        findings: class -> code in reports.
        engine: where the work is done, one of `medvit.deployment.engines.ENGINES`.
    """

    wanted: Wanted = field(default_factory=Wanted)
    settled_s: float = 0.0
    assume_hu: bool = False
    dicom: bool = True
    deidentify: bool = False
    findings: Mapping[str, Finding] = field(default_factory=dict)
    engine: str = "local"

    def identity(self, model: Model) -> tuple[str, str, str]:
        """What results must share: hashes of model, configuration and site key."""
        return model.info.weights_sha256, self.config_sha256(model), pseudonym("ledger", "")

    def config_sha256(self, model: Model) -> str:
        """Hash of whatever decides what is written, beside the weights."""
        config = {
            "bundle": model.info.model_dump(mode="json"),
            "assume_hu": self.assume_hu,
            "dicom": self.dicom,
            "deidentify": self.deidentify,
            "findings": {name: list(code) for name, code in self.findings.items()},
        }
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()

    def context(self, model: Model, now: datetime) -> ResultContext:
        """What a DICOM result says beside its prediction."""
        sha256 = model.info.weights_sha256
        return ResultContext(
            model_name="".join(
                one if one.isascii() and one.isprintable() else "?" for one in model.info.architecture.name
            )[:64],
            model_version=f"{sha256[:12]} medvit {medvit.__version__}",
            model_sha256=sha256,
            config_sha256=self.config_sha256(model),
            now=now,
            findings=self.findings,
            pseudonym=pseudonym if self.deidentify else None,
        )

    def named(self, kind: str, text: str) -> str:
        """A UID or path as it is written: hashed under the site's key where nobody may be known by it."""
        return pseudonym(kind, text) if self.deidentify and text else text

    def study(self, uid: str) -> str:
        """What a study is called in the ledger."""
        return self.named("study", uid)

    def path(self, text: str) -> str:
        """A path below the folder, as text: names need not be."""
        return self.named("path", text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"))

    def row(self, prediction: Prediction) -> dict[str, Any]:
        """The row of predictions.csv."""
        row = prediction.to_row()
        kinds = {"study_uid": "study", "series_uid": "series", "site": "site"}
        return row | {column: self.named(kind, str(row[column] or "")) for column, kind in kinds.items()}
