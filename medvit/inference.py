"""A trained model at work: scans -> Predictions. The one prediction path of validation, evaluation and deployment.

What a report says about a model holds for what is deployed because both come through `Model.predict_slices`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medvit.config import TtaConfig
from medvit.data.pipelines import Slices, choose_slices, prediction_transform, prepare_slices, resize_slices
from medvit.data.pseudonym import pseudonym
from medvit.data.views import AS_IT_IS, View, draw_views, look, rewindowed
from medvit.models.bundle import open_bundle, open_reference
from medvit.models.bundle_info import BundleInfo
from medvit.models.classifier import CtClassifier
from medvit.models.reference import FLAG, Reference
from medvit.records import Case, Prediction, Preprocessing, ReasonCode, Scan, ScanError, UsageError

Floats = npt.NDArray[np.float32]

STUDIES_AT_ONCE = 256
"""Through pooling and head, which are small."""


class StudyOutput(NamedTuple):
    """Of one study: `logits` (K,), `weights` (S,) of its slices, its `pooled` features (D,), `features` (S, D) of them.

    With several views logits and weights are means over them, features those of the slices as they are, and `views`
    (V, K) the logits of each.
    """

    logits: Floats
    weights: Floats
    pooled: Floats
    views: Floats
    features: Floats


@dataclass(frozen=True)
class Encoder:
    """Slices -> features of the backbone, in chunks, exactly as in prediction.

    Attributes:
        classifier: its backbone is used.
        preprocessing: windows and slice rule.
        mean: per channel; `std` too.
        batch_slices: slices through the backbone at once.
        views: of test-time augmentation, the slices as they are first.
    """

    classifier: CtClassifier
    preprocessing: Preprocessing
    mean: tuple[float, ...]
    std: tuple[float, ...]
    batch_slices: int = 32
    views: tuple[View, ...] = (AS_IT_IS,)

    def study(self, slices: Slices) -> tuple[npt.NDArray[np.intp], StudyOutput]:
        """int16 HU (Z, size, size) -> which slices were looked at, and what the model made of them in all views."""
        chosen = self.choose(len(slices))
        return chosen, self.look(slices[chosen])

    def look(self, chosen: Slices) -> StudyOutput:
        """What the model makes of the slices of a study that were chosen, int16 HU (S, size, size), in all views."""
        # each view by itself: batches of another shape would round differently
        return combined([self.studies([self.encode(chosen, view)])[0] for view in self.views])

    def encode(self, slices: Slices, view: View = AS_IT_IS) -> Floats:
        """int16 HU (S, size, size) -> features (S, D), as a view shows them."""
        return self._through(self.classifier.backbone, slices, lambda some: self.values(some, view))

    def trunk(self, slices: Slices) -> Floats:
        """int16 HU (S, size, size) -> (S, ...) what a frozen backbone has to say, before anything that learns."""
        return self._through(self.classifier.backbone.trunk, slices, self.values)

    def finish(self, states: Floats) -> Floats:
        """What `trunk` gave (S, ...) -> features (S, D)."""
        return self._through(self.classifier.backbone.finish, states, torch.tensor)

    def _through(
        self, part: Callable[[Tensor], Tensor], slices: npt.NDArray[Any], look: Callable[[Any], Tensor]
    ) -> Floats:
        """A part of the backbone, in chunks."""
        device = next(self.classifier.parameters()).device
        chunks: list[Tensor] = []
        with torch.inference_mode(), self.judging():
            for start in range(0, len(slices), self.batch_slices):
                values = look(slices[start : start + self.batch_slices])
                chunks.append(part(values.to(device)).float().cpu())
        return torch.cat(chunks).numpy()

    def values(self, slices: npt.NDArray[Any], view: View = AS_IT_IS) -> Tensor:
        """HU (S, H, H) -> what the backbone is given, (S, C, size, size)."""
        windows = rewindowed(self.preprocessing.windows, view)
        preprocessing = self.preprocessing.model_copy(update={"windows": windows})
        seen = look(resize_slices(np.array(slices, np.float32), self.classifier.backbone.size), view)
        return torch.as_tensor(prediction_transform(preprocessing, self.mean, self.std)(seen)).as_subclass(Tensor)

    @contextmanager
    def judging(self) -> Iterator[None]:
        """The classifier in evaluation mode, its weights without gradient; afterwards as it was, module by module."""
        modes = [(module, module.training) for module in self.classifier.modules()]
        learning = [parameter for parameter in self.classifier.parameters() if parameter.requires_grad]
        self.classifier.eval().requires_grad_(False)
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            for parameter in learning:
                parameter.requires_grad_()

    def means(self, cases: Iterable[Slices]) -> Iterator[Floats]:
        """int16 HU (Z, size, size) of each case -> mean feature (D,) of the slices that a prediction looks at.

        Small cases go through the backbone together: one slice at a time would keep it waiting.
        """
        pending: list[Slices] = []
        for slices in cases:
            pending.append(slices[self.choose(len(slices))])
            if sum(map(len, pending)) >= self.batch_slices:
                yield from self._means(pending)
                pending = []
        if pending:
            yield from self._means(pending)

    def _means(self, cases: Sequence[Slices]) -> list[Floats]:
        ends = np.cumsum([len(slices) for slices in cases])[:-1]
        return [features.mean(axis=0) for features in np.split(self.encode(np.concatenate(cases)), ends)]

    def studies(self, features: Sequence[Floats]) -> list[StudyOutput]:
        """Features (S, D) of the chosen slices of each study -> what the model makes of it."""
        device = next(self.classifier.parameters()).device
        results: list[StudyOutput] = []
        with torch.inference_mode(), self.judging():
            for start in range(0, len(features), STUDIES_AT_ONCE):
                some = [torch.tensor(one, dtype=torch.float32) for one in features[start : start + STUDIES_AT_ONCE]]
                values = pad_sequence(some, batch_first=True)  # (B, S, D)
                lengths = torch.tensor([len(one) for one in some])
                mask = torch.arange(values.shape[1]) < lengths[:, None]
                output = self.classifier(values.to(device), mask.to(device))
                logits, weights, pooled = (part.float().cpu().numpy() for part in output)
                results += [
                    StudyOutput(logits[row], weights[row, : len(one)], pooled[row], logits[row : row + 1], one)
                    for row, one in enumerate(features[start : start + STUDIES_AT_ONCE])
                ]
        return results

    def choose(self, count: int) -> npt.NDArray[np.intp]:
        """Which of `count` slices a prediction looks at."""
        return choose_slices(count, self.preprocessing.predict_slices)


def combined(outputs: Sequence[StudyOutput]) -> StudyOutput:
    """One output of those of all views. Means are taken in float64, so that equal views give exactly what one gives."""

    def mean(parts: Sequence[Floats] | Floats) -> Floats:
        return np.asarray(np.mean(parts, axis=0, dtype=np.float64), np.float32)

    views, plain = np.concatenate([one.views for one in outputs]), outputs[0]
    return plain._replace(logits=mean(views), weights=mean([one.weights for one in outputs]), views=views)


def softmax(logits: npt.NDArray[np.floating[Any]], temperature: float = 1.0) -> Floats:
    """(K,) logits -> probabilities."""
    scaled = logits.astype(np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return np.asarray(powers / powers.sum(), np.float32)


@dataclass(frozen=True)
class Model:
    """A bundle ready to predict. See `load_bundle`.

    Attributes:
        encoder: classifier and what it is shown.
        info: temperature, threshold, class order and the rest of bundle.json.
        reference: what the model knows; None: it flags nothing as unknown.
    """

    encoder: Encoder
    info: BundleInfo
    reference: Reference | None = None

    def with_views(self, tta: TtaConfig | None) -> Model:
        """The same model with test-time augmentation, or without: `info.tta` says which."""
        backbone = self.encoder.classifier.backbone
        views = draw_views(tta, self.preprocessing.size, backbone.patch)
        if (views, tta) == (self.encoder.views, self.info.tta):
            return self  # the same encoder keeps what is cached of it
        return replace(self, encoder=replace(self.encoder, views=views), info=self.info.model_copy(update={"tta": tta}))

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
        """Predict a case from its prepared slices, int16 HU (Z, size, size).

        Raises:
            ScanError: NOT_FOR_MODEL, before any score: it is unlike all training scans in what `info.refuse` names.
        """
        self.refuse(case)
        return self.prediction(case, *self.encoder.study(slices))

    def refuse(self, case: Case) -> None:
        """Raise NOT_FOR_MODEL where the model must not be asked about a case."""
        unlike = [name for name in self.info.training_range.outside(case.acquisition) if name in self.info.refuse]
        if unlike:
            seen = ", ".join(f"{name} {case.acquisition[name]}" for name in unlike)
            raise ScanError(ReasonCode.NOT_FOR_MODEL, f"{seen}: no training scan was like that", case.files)

    def prediction(self, case: Case, chosen: npt.NDArray[np.intp], output: StudyOutput) -> Prediction:
        """The record of one case from what the model made of its `chosen` slices (S,)."""
        probabilities = softmax(output.logits, self.info.temperature)
        known = self.reference
        score = None if known is None else float(known.score(output.pooled[None])[0])
        unknown = known is not None and score is not None and score > known.threshold
        unseen = [f"UNSEEN_{name.upper()}" for name in self.info.training_range.outside(case.acquisition)]
        of_views = np.stack([softmax(logits, self.info.temperature) for logits in output.views])
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
            flags=(*(str(code) for code in case.codes), *unseen, *([FLAG] if unknown else [])),
            ood_score=score,
            spread=float(of_views.std(axis=0).max()) if len(of_views) > 1 else None,
            slice_weights=tuple(zip(chosen.tolist(), output.weights.tolist(), strict=True)),
            model_sha256=self.info.weights_sha256,
            attributes=case.attributes,
        )


@dataclass(frozen=True)
class Judged:
    """A case that was predicted, with the model that did: with folds every case has its own, which never saw it.

    Attributes:
        model: which predicted it.
        case: with its label.
        prediction: what the model said.
        load: case -> prepared slices, int16 HU (Z, size, size).
    """

    model: Model
    case: Case
    prediction: Prediction
    load: Callable[[Case], Slices]

    @property
    def slices(self) -> Slices:
        """Those that the prediction looked at, int16 HU (S, size, size)."""
        return self.load(self.case)[[number for number, _ in self.prediction.slice_weights]]

    @property
    def right(self) -> bool:
        """Whether the call is the label."""
        return self.prediction.predicted == self.case.label


def load_bundle(path: str | Path, *, batch_slices: int = 32, device: str | torch.device = "cpu") -> Model:
    """Load a trained model from a run or bundle folder.

    Args:
        path: output of medvit-train, or its `bundle` folder.
        batch_slices: slices through the backbone at once: the memory knob.
        device: where to compute.

    Raises:
        UsageError: missing, damaged, written by a newer medvit, or pretrained without labels.
    """
    classifier, info = open_bundle(Path(path))
    if not info.classes:
        raise UsageError(
            f"{path}: pretrained without labels, so it knows no class. Train it with labels first: medvit-train FOLDER "
            f"--labels CSV model.name={info.architecture.name} model.weights={path}."
        )
    classifier.to(device)
    encoder = Encoder(classifier, info.preprocessing, info.mean, info.std, batch_slices)
    return Model(encoder, info, open_reference(Path(path), info)).with_views(info.tta)


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
        acquisition=header.acquisition(),
    )
