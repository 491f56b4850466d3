"""A trained model at work: scans -> Predictions. The one prediction path of validation, evaluation and deployment.

What a report says about a model holds for what is deployed because both come through `Model.predict_slices`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medvit.data.pipelines import Slices, choose_slices, prediction_transform, prepare_slices, resize_slices
from medvit.data.pseudonym import pseudonym
from medvit.models.bundle import BundleInfo, open_bundle
from medvit.models.classifier import CtClassifier
from medvit.records import Case, Prediction, Preprocessing, Scan

Floats = npt.NDArray[np.float32]

STUDIES_AT_ONCE = 256
"""Through pooling and head, which are small."""


class StudyOutput(NamedTuple):
    """Of one study: `logits` (K,), `weights` (S,) of its slices, and its `pooled` features (D,)."""

    logits: Floats
    weights: Floats
    pooled: Floats


@dataclass(frozen=True)
class Encoder:
    """Slices -> features of the backbone, in chunks, exactly as in prediction.

    Attributes:
        classifier: its backbone is used.
        preprocessing: windows and slice rule.
        mean: per channel; `std` too.
        batch_slices: slices through the backbone at once.
    """

    classifier: CtClassifier
    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_slices: int = 32

    def encode(self, slices: Slices) -> Floats:
        """int16 HU (S, size, size) -> features (S, D)."""
        transform = prediction_transform(self.preprocessing, self.mean, self.std)
        device = next(self.classifier.parameters()).device
        was_training = self.classifier.training
        self.classifier.eval()
        chunks: list[Tensor] = []
        with torch.inference_mode():
            for start in range(0, len(slices), self.batch_slices):
                some = np.array(slices[start : start + self.batch_slices], np.float32)
                values = torch.as_tensor(transform(resize_slices(some, self.classifier.backbone.size)))
                chunks.append(self.classifier.backbone(values.as_subclass(Tensor).to(device)).float().cpu())
        self.classifier.train(was_training)
        return torch.cat(chunks).numpy()

    def studies(self, features: Sequence[Floats]) -> list[StudyOutput]:
        """Features (S, D) of the chosen slices of each study -> what the model makes of it."""
        device = next(self.classifier.parameters()).device
        was_training = self.classifier.training
        self.classifier.eval()
        results: list[StudyOutput] = []
        with torch.inference_mode():
            for start in range(0, len(features), STUDIES_AT_ONCE):
                some = [torch.tensor(one, dtype=torch.float32) for one in features[start : start + STUDIES_AT_ONCE]]
                values = pad_sequence(some, batch_first=True)  # (B, S, D)
                lengths = torch.tensor([len(one) for one in some])
                mask = torch.arange(values.shape[1]) < lengths[:, None]
                output = self.classifier(values.to(device), mask.to(device))
                logits, weights, pooled = (part.float().cpu().numpy() for part in output)
                results += [
                    StudyOutput(logits[row], weights[row, : len(one)], pooled[row]) for row, one in enumerate(some)
                ]
        self.classifier.train(was_training)
        return results

    def choose(self, count: int) -> npt.NDArray[np.intp]:
        """Which of `count` slices a prediction looks at."""
        return choose_slices(count, self.preprocessing.predict_slices)


def softmax(logits: npt.NDArray[np.floating[Any]], temperature: float = 1.0) -> Floats:
    """(K,) logits -> probabilities."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum(), np.float32)


@dataclass(frozen=True)
class Model:
    """A bundle ready to predict. See `load_bundle`."""

    encoder: Encoder
    info: BundleInfo

    @property
    def preprocessing(self) -> Preprocessing:
        """As trained."""
        return self.info.preprocessing

    def predict(self, scans: Iterable[Scan]) -> list[Prediction]:
        """One prediction per scan; identifiers are hashed under the site's key."""
        return [self.predict_slices(prepare_slices(scan, self.preprocessing), case_of(scan)) for scan in scans]

    def features(self, scans: Iterable[Scan]) -> list[Floats]:
        """Backbone features (S, D) of the slices that a prediction looks at, one array per scan."""
        prepared = (prepare_slices(scan, self.preprocessing) for scan in scans)
        return [self.encoder.encode(slices[self.encoder.choose(len(slices))]) for slices in prepared]

    def predict_slices(self, slices: Slices, case: Case) -> Prediction:
        """Predict a case from its prepared slices, int16 HU (Z, size, size)."""
        chosen = self.encoder.choose(len(slices))
        ((logits, weights, _),) = self.encoder.studies([self.encoder.encode(slices[chosen])])
        return self.prediction(case, logits, chosen, weights)

    def prediction(self, case: Case, logits: Floats, chosen: npt.NDArray[np.intp], weights: Floats) -> Prediction:
        """The record of one case from its logits (K,) and slice weights (S,)."""
        probabilities = softmax(logits, self.info.temperature)
        return Prediction(
            case_id=case.case_id,
            patient_id=case.patient_id,
            probabilities=dict(zip(self.info.classes, probabilities.tolist(), strict=True)),
            label=case.label,
            site=case.site,
            sex=case.sex,
            age=case.age,
            threshold=self.info.threshold,
            study_uid=case.study_uid,
            series_uid=case.series_uid,
            flags=tuple(str(code) for code in case.codes),
            slice_weights=tuple(zip(chosen.tolist(), weights.tolist(), strict=True)),
            model_sha256=self.info.weights_sha256,
            attributes=case.attributes,
        )


def load_bundle(path: str | Path, *, batch_slices: int = 32, device: str | torch.device = "cpu") -> Model:
    """Load a trained model from a run or bundle folder.

    Args:
        path: output of medvit-train, or its `bundle` folder.
        batch_slices: slices through the backbone at once: the memory knob.
        device: where to compute.

    Raises:
        UsageError: missing, damaged, or written by a newer medvit.
    """
    classifier, info = open_bundle(Path(path))
    classifier.to(device)
    return Model(Encoder(classifier, info.preprocessing, info.mean, info.std, batch_slices), info)


def case_of(scan: Scan) -> Case:
    """The unlabelled case of a scan that was read outside a manifest."""
    header = scan.header
    patient = pseudonym("patient", header.patient_id or header.study_uid or "\0".join(scan.files))
    return Case(
        case_id=pseudonym("case", header.study_uid, header.series_uid or "\0".join(scan.files)),
        patient_id=patient,
        group=patient,
        root="",
        files=scan.files,
        site=header.site,
        site_source=header.site_source,
        sex=header.sex,
        age=header.age,
        study_uid=header.study_uid,
        series_uid=header.series_uid,
        codes=scan.codes,
    )


def recalibrated(
    predictions: Sequence[Prediction], temperature: float = 1.0, threshold: float | None = None
) -> list[Prediction]:
    """The same predictions, made at temperature 1, with logits divided by `temperature`, and decided at `threshold`."""
    return [
        replace(one, probabilities=_tempered(one.probabilities, temperature), threshold=threshold)
        for one in predictions
    ]


def _tempered(probabilities: Mapping[str, float], temperature: float) -> Mapping[str, float]:
    if temperature == 1:
        return probabilities
    logits = np.log(np.clip(list(probabilities.values()), 1e-12, 1), dtype=np.float64)
    return dict(zip(probabilities, softmax(logits, temperature).tolist(), strict=True))
